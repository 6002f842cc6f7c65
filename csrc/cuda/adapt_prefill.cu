// adapt for training and prefill: y = y0 + bias + scaling * concat_j(B z^(j)), z = sum_i <T_i, x_i> x_i, in one launch.
//
// A block of 8 warps takes 32 tokens, and all columns of y or, when there are few tokens, a share of them:
//   1. order    the k r gathered columns are sorted, once a block, so that a warp reads whole sectors of y0;
//   2. gather   x goes to shared memory as [rank][token], a token a lane from here on. The odd number of words in a row of
//               it makes both the writes (lanes are ranks) and the reads (lanes are tokens) free of bank conflicts, for
//               any choice of rows;
//   3. route    a_i, then z, in float32, centred where u is summed; z is rounded once and stored for ldmatrix;
//   4. product  tensor.cuh. y0 is found again in L2.
#include "sort_columns.cuh"
#include "tensor.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

constexpr int TOKENS = 32, WARPS = 8, THREADS = 32 * WARPS;
constexpr int X_STRIDE = TOKENS + 2, X_WORDS = X_STRIDE / 2;  // elements and words of a row of x; the words are odd
constexpr int MAX_GATHERED = 65536 / X_WORDS;                 // for 16-bit offsets; shared memory ends before

struct Layout : SharedLayout {
  int order, row_of, row_scale, router, center, a, scale, z, x;

  __host__ __device__ explicit Layout(const AdaptProblem& p) {
    const int d = p.d, k = p.k, r = p.r, s = p.s, kr = k * r;
    order = take(kr * sizeof(int));
    row_of = take(kr * sizeof(uint16_t));
    row_scale = take(p.row_scale ? kr * sizeof(float) : 0);
    router = take(router_size(p) * sizeof(float));
    center = take(center_bytes(p));
    a = take(k * TOKENS * sizeof(float));
    scale = take(TOKENS * sizeof(float));
    // The warps' shares of a and of <w, u> are done with before z is written, the bits of the sort before x is.
    z = take_larger(WARPS * (k < 3 ? 3 : k) * TOKENS * sizeof(float), TOKENS * z_stride(s, r / s) * 2);
    x = take_larger(sort_bytes(d), static_cast<size_t>(kr) * X_STRIDE * 2);
  }
};

// x of two neighbouring positions for the lane's token: `x_lane` is the lane's column of x, `offsets` the words before
// their rows.
template <class T>
__device__ __forceinline__ float2 x_at(const T* x_lane, uint32_t offsets) {
  return make_float2(to_float(x_lane[2 * (offsets & 0xffff)]), to_float(x_lane[2 * (offsets >> 16)]));
}

// `kept` positions of x; if these are fewer than kr, what lies `kept` apart is added up. Less along * ubar, if not null.
template <class T>
__device__ void store_x(T* out, const T* x_lane, const uint16_t* row_of, int kept, int kr, int tokens,
                        const float* ubar, float along) {
  for (int p = threadIdx.x / 32 * 16; p < kept; p += 16 * WARPS) {
    uint32_t own[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (p + 8 * half < kept) {
        float2 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = make_float2(-0.0f, -0.0f);  // to which adding x gives x, whatever its sign
        for (int b = p + 8 * half; b < kr; b += kept) {
          const uint4 rows = *reinterpret_cast<const uint4*>(row_of + b);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 u = x_at(x_lane, word(rows, i));
            v[i].x += u.x, v[i].y += u.y;
          }
        }
        if (ubar) {
#pragma unroll
          for (int i = 0; i < 4; ++i) subtract(v[i], along, ubar + p + 8 * half + 2 * i);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) own[half][i] = pack<T>(v[i].x, v[i].y);
      }
    store_rows(out + p, kept, own, true, p + 8 < kept, tokens);
  }
}

template <class T, class BT, int CHUNKS>
__global__ void __launch_bounds__(THREADS, CHUNKS == 2 ? 2 : 1) adapt_prefill(const __grid_constant__ AdaptProblem p, int splits) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int k = p.k, r = p.r, s = p.s, q = r / s, kr = k * r, d = p.d, ds = d / s;
  const Layout at(p);
  int* const order = reinterpret_cast<int*>(shared + at.order);
  uint16_t* const row_of = reinterpret_cast<uint16_t*>(shared + at.row_of);
  float *const row_scale = reinterpret_cast<float*>(shared + at.row_scale), *const router = reinterpret_cast<float*>(shared + at.router);
  float *const a = reinterpret_cast<float*>(shared + at.a), *const scale = reinterpret_cast<float*>(shared + at.scale);
  float* const ubar = reinterpret_cast<float*>(shared + at.center);  // and then w
  float* const shares = reinterpret_cast<float*>(shared + at.z);
  T *const z = reinterpret_cast<T*>(shared + at.z), *const x = reinterpret_cast<T*>(shared + at.x);
  const T* const x_lane = x + threadIdx.x % 32;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Share own = share_of_block<TOKENS>(p.N, ds, splits);
  const int64_t first = own.first;
  const int tokens = own.tokens;

  // 1. order
  load_router(p, router, ubar);
  sort_columns(p.index, kr, d, reinterpret_cast<uint32_t*>(x), [&](int rank, int column, int position) {
    order[rank] = column;
    row_of[position] = static_cast<uint16_t>(rank * X_WORDS);
    if (p.row_scale) row_scale[rank] = __ldg(p.row_scale + position);
  });
  __syncthreads();

  // 2. gather
  const T* const y0 = static_cast<const T*>(p.y0) + first * p.y0_stride;
  for (int rank = lane; rank < kr; rank += 32) {
    const int column = order[rank];
    const bool subtract = p.bias && p.bias_in_y0;
    const float bias = subtract ? load_as_float(p.bias, p.bias_dtype, column) : 0, c = p.row_scale ? row_scale[rank] : 1;
    T v[TOKENS / WARPS];
#pragma unroll
    for (int i = 0; i < TOKENS / WARPS; ++i) {
      const int n = warp + i * WARPS;
      v[i] = n < tokens ? y0[n * p.y0_stride + column] : from_float<T>(0);
    }
#pragma unroll
    for (int i = 0; i < TOKENS / WARPS; ++i) {
      if (subtract || p.row_scale) v[i] = from_float<T>((to_float(v[i]) - bias) * c);
      x[rank * X_STRIDE + warp + i * WARPS] = v[i];
    }
  }
  BColumns<T, BT, CHUNKS> columns;  // on its way while the tokens are routed
  if (own.group < own.end) columns.load(p.B, ds, q, own.group);
  __syncthreads();

  // 3. route: each warp's share of <T_i, x_i>, their sum, then z by blocks of 32 positions of a part
  float along = 0;  // <w, u>; of one weight for all clusters at first with u = sum_i x_i
  if (p.center) {
    for (int i = 0; i < k; ++i) {
      const float a_i = p.router_rows == 1 ? 1 : router[i];
      for (int b = 8 * warp; b < r; b += 8 * WARPS) {
        const uint4 rows = *reinterpret_cast<const uint4*>(row_of + i * r + b);
        float sum = 0;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float2 u = x_at(x_lane, word(rows, v)), w = reinterpret_cast<const float2*>(ubar + r + b)[v];
          sum = fmaf(w.y, u.y, fmaf(w.x, u.x, sum));
        }
        along = fmaf(a_i, sum, along);
      }
    }
    float* const own_shares = shares + 2 * WARPS * TOKENS + lane;  // behind those of a bounded router
    own_shares[warp * TOKENS] = along;
    __syncthreads();
    along = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) along += own_shares[w * TOKENS];
  }
  if (p.router_form == RouterForm::bounded) {  // of u = sum_i x_i: <T, u> and <u, u>
    float product = 0, square = 0;
    for (int b = 8 * warp; b < r; b += 8 * WARPS) {
      float2 u[4] = {};
      for (int i = 0; i < k; ++i) {
        const uint4 rows = *reinterpret_cast<const uint4*>(row_of + i * r + b);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 v = x_at(x_lane, word(rows, w));
          u[w].x += v.x, u[w].y += v.y;
        }
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (p.center) subtract(u[w], along, ubar + b + 2 * w);
        const float2 t = reinterpret_cast<const float2*>(router + b)[w];
        product = fmaf(t.y, u[w].y, fmaf(t.x, u[w].x, product));
        square = fmaf(u[w].y, u[w].y, fmaf(u[w].x, u[w].x, square));
      }
    }
    shares[2 * warp * TOKENS + lane] = product;
    shares[(2 * warp + 1) * TOKENS + lane] = square;
  }
  for (int i = 0; i < k && p.router_form == RouterForm::linear; ++i) {
    const float* const T_i = router + (p.router_rows == 1 ? 0 : i * r);
    float sum = 0;
    for (int b = 8 * warp; b < r; b += 8 * WARPS) {
      const uint4 rows = *reinterpret_cast<const uint4*>(row_of + i * r + b);
      const float4 t[2] = {*reinterpret_cast<const float4*>(T_i + b), *reinterpret_cast<const float4*>(T_i + b + 4)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 u = x_at(x_lane, word(rows, 2 * half)), v = x_at(x_lane, word(rows, 2 * half + 1));
        sum = fmaf(t[half].y, u.y, fmaf(t[half].x, u.x, sum));
        sum = fmaf(t[half].w, v.y, fmaf(t[half].z, v.x, sum));
      }
    }
    shares[(warp * k + i) * TOKENS + lane] = sum;
  }
  const int kept = p.x_clusters * r;
  if (p.x && own.split == 0) store_x(static_cast<T*>(p.x) + first * kept, x_lane, row_of, kept, kr, tokens,
                                    p.center && p.x_clusters == 1 ? ubar : nullptr, along);
  __syncthreads();
  if (p.router_form == RouterForm::bounded && warp == 0) {
    float product = 0, square = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) product += shares[2 * w * TOKENS + lane], square += shares[(2 * w + 1) * TOKENS + lane];
    const float weight = 1 + Weight(product, square, r).tanh;
    for (int i = 0; i < k; ++i) a[i * TOKENS + lane] = weight;
  }
  for (int i = warp; i < k && p.router_form != RouterForm::bounded; i += WARPS) {
    float sum = 0;
    if (p.router_form == RouterForm::constants)
      sum = router[p.router_rows == 1 ? 0 : i];
    else
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += shares[(w * k + i) * TOKENS + lane];
    a[i * TOKENS + lane] = sum;
  }
  __syncthreads();
  if (p.center && p.router_rows == 1) along *= a[lane];
  float unscale = 1;
  if constexpr (std::is_same_v<T, __half>) {
    float size = 0;  // z / sum_i |a_i| is no larger than the largest x
    for (int i = 0; i < k; ++i) size += fabsf(a[i * TOKENS + lane]);
    if (p.center) size += fabsf(along) * size_of_center(ubar, r);
    const float power = power_of_two_above(size);
    unscale = 1 / power;
    if (warp == 0) scale[lane] = power;
  }
  constexpr int blocks = CHUNKS;
  for (int b = warp; b < s * blocks; b += WARPS) {
    const int first_of_part = b % blocks * INNER, position = b / blocks * q + first_of_part;
    float sum[INNER] = {};
    for (int i = 0; i < k; ++i) {
      const float a_i = a[i * TOKENS + lane] * unscale;
#pragma unroll
      for (int e = 0; e < INNER; e += 8)
        if (first_of_part + e < q) {
          const uint4 rows = *reinterpret_cast<const uint4*>(row_of + i * r + position + e);
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const float2 v = x_at(x_lane, word(rows, w));
            sum[e + 2 * w] = fmaf(a_i, v.x, sum[e + 2 * w]);
            sum[e + 2 * w + 1] = fmaf(a_i, v.y, sum[e + 2 * w + 1]);
          }
        }
    }
    if (p.center)
#pragma unroll
      for (int e = 0; e < INNER; ++e)
        if (first_of_part + e < q) sum[e] = fmaf(-along * unscale, ubar[position + e], sum[e]);
    T* const row = z + lane * (s * CHUNKS * INNER + 8) + b * INNER;
#pragma unroll
    for (int m = 0; m < 4; ++m)  // as `slot` says
      *reinterpret_cast<uint4*>(row + 8 * m) =
          make_uint4(pack<T>(sum[2 * m], sum[2 * m + 1]), pack<T>(sum[8 + 2 * m], sum[9 + 2 * m]),
                     pack<T>(sum[16 + 2 * m], sum[17 + 2 * m]), pack<T>(sum[24 + 2 * m], sum[25 + 2 * m]));
  }
  __syncthreads();

  // 4. product
  multiply_and_store(Epilogue<T>(p, p.bias_in_y0 ? nullptr : p.bias), columns, p.B, z, scale, own, WARPS);
#endif
}

}  // namespace

bool fits_prefill(const AdaptProblem& p) {
  return fits_tensor_cores(p.dtype, p.d, p.r, p.s, p.y0_stride, p.y0, p.y, p.B) && (!p.x || aligned(p.x)) && p.k * p.r <= MAX_GATHERED &&
         Layout(p).bytes <= current_device().shared_per_block;
}

const char* prefill_adapt(const AdaptProblem& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.N, TOKENS), d = p.d, gathered = TOKENS * std::min(2 * d, 32 * p.k * p.r);
  const int splits = column_splits(tiles, gathered, 4 * TOKENS * d + B_bytes(p), ceil_div(d / p.s, COLUMNS * WARPS), 1.25);
  const Layout layout(p);
  return with_tensor_types(p.dtype, p.B_dtype, p.r / p.s, [&](auto t, auto b, auto chunks) {
    return launch(adapt_prefill<decltype(t), decltype(b), chunks.value>, dim3(static_cast<unsigned>(tiles * splits)),
                  THREADS, layout.bytes, stream, p, splits);
  });
}

}  // namespace idlora::cuda
