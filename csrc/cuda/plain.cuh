// What the plain kernels share: a warp that routes a token, and float32 products by tiles in shared memory.
//
// Nothing here assumes more of a shape than that it is valid. "Rows" are pairs (token n, part j) in that order: seen as
// [N s, d/s] and [N s, q], the product with diag(B, .., B) is one plain product with B.
#pragma once

#include "common.cuh"

namespace idlora::cuda::plain {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Entries [0, count) by one warp, DEPTH loads of a lane under way at a time: to(e, from(e)).
template <int DEPTH, class From, class To>
__device__ __forceinline__ void copy(int count, From&& from, To&& to) {
  for (int first = lane(); first < count; first += 32 * DEPTH) {
    decltype(from(0)) v[DEPTH];
#pragma unroll
    for (int u = 0; u < DEPTH; ++u)
      if (first + 32 * u < count) v[u] = from(first + 32 * u);
#pragma unroll
    for (int u = 0; u < DEPTH; ++u)
      if (first + 32 * u < count) to(first + 32 * u, v[u]);
  }
}

// c (y0 - bias) of a gathered y0: entry e of [k r], from `column`.
template <class T, class Problem>
__device__ __forceinline__ T moved(const Problem& p, T y0, bool subtract, int column, int e) {
  if (!subtract && !p.row_scale) return y0;
  float v = to_float(y0);
  if (subtract) v -= load_as_float(p.bias, p.bias_dtype, column);
  if (p.row_scale) v *= __ldg(p.row_scale + e);
  return from_float<T>(v);
}

// Calls f with the data of a parameter under its type, which is T or float32.
template <class T, class F>
__device__ __forceinline__ void typed(const void* data, Dtype dtype, F&& f) {
  if (dtype == Dtype::float32)
    f(static_cast<const float*>(data));
  else
    f(static_cast<const T*>(data));
}

// Calls f with a pointer to T_i, which is the same for all i where the router is shared.
template <class T, class Problem, class F>
__device__ __forceinline__ void with_router(const Problem& p, int i, F&& f) {
  typed<T>(p.router, p.router_dtype, [&](auto router) { f(router + (p.router_rows == 1 ? 0 : i * p.r)); });
}

// a_i of a static router.
template <class T, class Problem>
__device__ __forceinline__ float constant(const Problem& p, int i) {
  float a;
  typed<T>(p.router, p.router_dtype, [&](auto router) { a = to_float(__ldg(router + (p.router_rows == 1 ? 0 : i))); });
  return a;
}

// A bounded router's weight for u, by one warp.
template <class T, class Problem, class U>
__device__ __forceinline__ Weight weigh(const Problem& p, U&& u) {
  const int r = p.r;
  float product = 0, square = 0;
  with_router<T>(p, 0, [&](auto router) {
    for (int e = lane(); e < r; e += 32) {
      const float v = u(e);
      product = fmaf(to_float(__ldg(router + e)), v, product);
      square = fmaf(v, v, square);
    }
  });
  return Weight(warp_sum(product), warp_sum(square), r);
}

// z = sum_i a_i x_i, a_i = <T_i, x_i>, by one warp; with a center, P z. x(e) is entry e of the token's [k r];
// put(e, value, first) sets z_e to `value`, or adds to it what clusters beyond the first 32 give; always the same
// thread for an e. Lane l keeps a_l. Returns <w, u>, u = sum_i x_i, or sum_i a_i x_i of k constants; 0 without a center.
template <class T, class Problem, class X, class Put>
__device__ __forceinline__ float route(const Problem& p, const float* center, int k, X&& x, Put&& put) {
  const int r = p.r;
  auto sum = [&](int e) {
    float u = 0;
#pragma unroll 1
    for (int i = 0; i < k; ++i) u = fmaf(p.router_rows == 1 ? 1.0f : constant<T>(p, i), x(i * r + e), u);
    return u;
  };
  float weight = 0, along = 0;
  if (center) {
    for (int e = lane(); e < r; e += 32) along = fmaf(__ldg(center + r + e), sum(e), along);
    along = warp_sum(along);
  }
  auto centred = [&](int e, float u, float size) { return center ? fmaf(-size, __ldg(center + e), u) : u; };
  if (p.router_form == RouterForm::bounded)
    weight = 1 + weigh<T>(p, [&](int e) { return centred(e, sum(e), along); }).tanh;
  for (int first = 0; first < k; first += 32) {
    const int count = min(32, k - first);
    float own = weight;
    if (p.router_form == RouterForm::constants && lane() < count) own = constant<T>(p, first + lane());
    const float size = first > 0 ? 0 : p.router_rows == 1 ? along * __shfl_sync(~0u, own, 0) : along;
    for (int i = 0; i < count && p.router_form == RouterForm::linear; ++i) {
      float a = 0;
      with_router<T>(p, first + i, [&](auto T_i) {
#pragma unroll 4
        for (int e = lane(); e < r; e += 32) a = fmaf(to_float(__ldg(T_i + e)), x((first + i) * r + e), a);
      });
      a = warp_sum(a);
      if (lane() == i) own = a;
    }
    for (int e0 = 0; e0 < r; e0 += 32) {
      const int e = e0 + lane();
      float z[2] = {};  // of every second cluster: one long sum loses digits
      for (int i0 = 0; i0 < count; i0 += 2)
#pragma unroll
        for (int u = 0; u < 2; ++u)
          if (const int i = i0 + u; i < count) {
            const float a = __shfl_sync(~0u, own, i);
            if (e < r) z[u] = fmaf(a, x((first + i) * r + e), z[u]);
          }
      if (e < r) put(e, centred(e, z[0] + z[1], size), first == 0);
    }
  }
  return along;
}

// ---- products -------------------------------------------------------------------------------------------------------
//
// A block multiplies a tile of A, at most 64 rows, with a tile of B, 128 columns, INNER entries at a time, both in
// shared memory with the inner dimension slowest. Each warp has 8 rows, each lane the columns lane + 32 u: A is read as
// a broadcast, B without bank conflicts, 24 accesses for 128 multiply-adds.

constexpr int A_ROWS = 8 * WARPS, COLUMNS = 128, INNER = 32;
constexpr int A_STRIDE = A_ROWS + 4;   // a multiple of 16 bytes
constexpr int B_STRIDE = COLUMNS + 1;  // odd: lanes may write a row or a column of the tile

// c[m][u] += sum_i A[i][m] B[i][lane + 32 u]. Summed on its own before it is added to c: one long sum loses digits.
// UNROLL: as many entries at a time as the caller has registers for.
template <int UNROLL>
__device__ __forceinline__ void multiply(float (&c)[8][4], const float* A, int A_stride, const float* B, int count) {
  B += lane();
  float sum[8][4] = {};
#pragma unroll UNROLL
  for (int i = 0; i < count; ++i) {
    const float4 lo = *reinterpret_cast<const float4*>(A + i * A_stride);
    const float4 hi = *reinterpret_cast<const float4*>(A + i * A_stride + 4);
    const float a[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float b = B[i * B_STRIDE + 32 * u];
#pragma unroll
      for (int m = 0; m < 8; ++m) sum[m][u] = fmaf(a[m], b, sum[m][u]);
    }
  }
#pragma unroll
  for (int u = 0; u < 4; ++u)
#pragma unroll
    for (int m = 0; m < 8; ++m) c[m][u] += sum[m][u];
}

// A tile of OUTER x INNER numbers on its way through registers: loaded before a product, stored after it. Neighbouring
// lanes read neighbours along the inner dimension, or along the outer one.
template <class T, int OUTER, bool ALONG_INNER>
struct Tile {
  static constexpr int COUNT = OUTER * INNER / THREADS;
  T v[COUNT];

  static __device__ __forceinline__ int outer(int e) {
    return ALONG_INNER ? warp() + WARPS * e : lane() + 32 * (e % (OUTER / 32));
  }
  static __device__ __forceinline__ int inner(int e) {
    return ALONG_INNER ? lane() : warp() + WARPS * (e / (OUTER / 32));
  }

  // at(outer, inner)
  template <class At>
  __device__ __forceinline__ void load(At&& at) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) v[e] = at(outer(e), inner(e));
  }
  __device__ __forceinline__ void store(float* tile, int stride) const {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) tile[inner(e) * stride + outer(e)] = to_float(v[e]);
  }
};

}  // namespace idlora::cuda::plain
