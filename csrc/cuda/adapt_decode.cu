// adapt for few tokens (N <= 64): one launch whose time is latency and the reading of B.
//
// A block of 4 warps takes 16 tokens and a slice of the columns, so that B is spread over many SMs; each block gathers and
// routes its tokens anew. The columns of B are on their way from the first instruction on. Unlike for prefill, lanes are
// positions, not tokens: with one token all lanes still work.
#include "sort_columns.cuh"
#include "tensor.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

constexpr int TOKENS = ROWS, WARPS = 4, THREADS = 32 * WARPS;
constexpr int UNSORTED = 4;  // up to so many tokens, sorting the columns costs more than the sectors it saves

struct Layout : SharedLayout {
  int order, router, center, a, along, scale, z, x;

  __host__ __device__ explicit Layout(const AdaptProblem& p) {
    const int d = p.d, k = p.k, r = p.r, s = p.s, kr = k * r;
    order = take(kr * sizeof(int2));
    router = take(router_size(p) * sizeof(float));
    center = take(center_bytes(p));
    a = take(TOKENS * k * sizeof(float));
    along = take(p.center ? TOKENS * sizeof(float) : 0);
    scale = take(TOKENS * sizeof(float));
    z = take(TOKENS * z_stride(s, r / s) * 2);
    x = take_larger(sort_bytes(d), static_cast<size_t>(TOKENS) * kr * 2);
  }
};

template <class T, class BT, int CHUNKS>
__global__ void __launch_bounds__(THREADS) adapt_decode(const __grid_constant__ AdaptProblem p, int splits) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int k = p.k, r = p.r, s = p.s, q = r / s, kr = k * r, d = p.d, ds = d / s;
  const Layout at(p);
  int2* const order = reinterpret_cast<int2*>(shared + at.order);  // column, position
  float* const router = reinterpret_cast<float*>(shared + at.router);
  float* const ubar = reinterpret_cast<float*>(shared + at.center);  // and then w
  float* const along = reinterpret_cast<float*>(shared + at.along);
  float *const a = reinterpret_cast<float*>(shared + at.a), *const scale = reinterpret_cast<float*>(shared + at.scale);
  T *const z = reinterpret_cast<T*>(shared + at.z), *const x = reinterpret_cast<T*>(shared + at.x);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Share own = share_of_block<TOKENS>(p.N, ds, splits);
  const int64_t first = own.first;
  const int tokens = own.tokens;

  BColumns<T, BT, CHUNKS> columns;
  if (own.group < own.end) columns.load(p.B, ds, q, own.group);

  // gather
  load_router(p, router, ubar);
  if (tokens > UNSORTED) {
    sort_columns(p.index, kr, d, reinterpret_cast<uint32_t*>(x),
                 [&](int rank, int column, int position) { order[rank] = make_int2(column, position); });
    __syncthreads();
  }
  const T* const y0 = static_cast<const T*>(p.y0) + first * p.y0_stride;
  for (int i = threadIdx.x; i < kr; i += THREADS) {
    const int2 entry = tokens > UNSORTED ? order[i] : make_int2(p.index[i], i);
    const bool subtract = p.bias && p.bias_in_y0;
    const float bias = subtract ? load_as_float(p.bias, p.bias_dtype, entry.x) : 0;
    const float c = p.row_scale ? __ldg(p.row_scale + entry.y) : 1;
#pragma unroll 4
    for (int n = 0; n < tokens; ++n) {
      const T v = y0[n * p.y0_stride + entry.x];
      x[n * kr + entry.y] = subtract || p.row_scale ? from_float<T>((to_float(v) - bias) * c) : v;
    }
  }
  __syncthreads();

  // <w, u> of a center; of one weight for all clusters with u = sum_i x_i
  for (int n = warp; n < tokens && p.center; n += WARPS) {
    float sum = 0;
    for (int i = lane; i < r / 2; i += 32) {
      const float2 w = reinterpret_cast<const float2*>(ubar + r)[i];
      for (int c = 0; c < k; ++c) {
        const float2 v = unpack<T>(reinterpret_cast<const uint32_t*>(x + n * kr + c * r)[i]);
        sum = fmaf(p.router_rows == 1 ? 1 : router[c], fmaf(w.y, v.y, w.x * v.x), sum);
      }
    }
#pragma unroll
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) along[n] = sum;
    __syncwarp();
  }

  // a_i: a warp for each token and cluster
  if (p.router_form == RouterForm::constants)
    for (int pair = threadIdx.x; pair < tokens * k; pair += THREADS) a[pair] = router[p.router_rows == 1 ? 0 : pair % k];
  for (int n = warp; n < tokens && p.router_form == RouterForm::bounded; n += WARPS) {  // a warp for each token
    float product = 0, square = 0;
    for (int i = lane; i < r / 2; i += 32) {
      float2 u = make_float2(0, 0);
      for (int c = 0; c < k; ++c) {
        const float2 v = unpack<T>(reinterpret_cast<const uint32_t*>(x + n * kr + c * r)[i]);
        u.x += v.x, u.y += v.y;
      }
      if (p.center) subtract(u, along[n], ubar + 2 * i);
      const float2 t = reinterpret_cast<const float2*>(router)[i];
      product = fmaf(t.y, u.y, fmaf(t.x, u.x, product));
      square = fmaf(u.y, u.y, fmaf(u.x, u.x, square));
    }
#pragma unroll
    for (int o = 16; o; o /= 2) {
      product += __shfl_xor_sync(~0u, product, o);
      square += __shfl_xor_sync(~0u, square, o);
    }
    const float weight = 1 + Weight(product, square, r).tanh;
    for (int c = lane; c < k; c += 32) a[n * k + c] = weight;
  }
  for (int pair = warp; pair < tokens * k && p.router_form == RouterForm::linear; pair += WARPS) {
    const float* const T_i = router + (p.router_rows == 1 ? 0 : pair % k * r);
    const uint32_t* const x_i = reinterpret_cast<const uint32_t*>(x + pair * r);
    float sum = 0;
    for (int i = lane; i < r / 2; i += 32) {
      const float2 v = unpack<T>(x_i[i]), t = reinterpret_cast<const float2*>(T_i)[i];
      sum = fmaf(t.y, v.y, fmaf(t.x, v.x, sum));
    }
#pragma unroll
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) a[pair] = sum;
  }
  __syncthreads();

  if (p.x && own.split == 0) {
    const int kept = p.x_clusters * r;
    uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<T*>(p.x) + first * kept);
    if (!keeps_sum(p)) {
      for (int i = threadIdx.x; i < tokens * kr / 8; i += THREADS)
        reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(x)[i];
    } else {
      for (int i = threadIdx.x; i < tokens * r / 2; i += THREADS) {
        const int n = i / (r / 2), w = i % (r / 2);
        const uint32_t* from = reinterpret_cast<const uint32_t*>(x) + n * (kr / 2) + w;
        float2 sum = make_float2(0, 0);
        for (int c = 0; c < k; ++c, from += r / 2) {
          const float2 v = unpack<T>(*from);
          sum.x += v.x, sum.y += v.y;
        }
        if (p.center) subtract(sum, along[n], ubar + 2 * w);
        out[i] = pack<T>(sum.x, sum.y);
      }
    }
  }

  // z, two neighbours at a time; zeros where there is no token and behind each part
  constexpr int HALF = CHUNKS * INNER / 2;
  const float largest = std::is_same_v<T, __half> && p.center ? size_of_center(ubar, r) : 0;
  for (int i = threadIdx.x; i < TOKENS * s * HALF; i += THREADS) {
    const int n = i / (s * HALF), w = i % (s * HALF), j = w / HALF, e = 2 * (w % HALF);
    float2 sum = make_float2(0, 0);
    if (n < tokens && e < q) {
      float unscale = 1, less = 0;
      if (p.center) less = p.router_rows == 1 ? along[n] * a[n * k] : along[n];
      if constexpr (std::is_same_v<T, __half>) {  // as in adapt_prefill.cu
        float size = 0;
        for (int c = 0; c < k; ++c) size += fabsf(a[n * k + c]);
        const float power = power_of_two_above(size + fabsf(less) * largest);
        unscale = 1 / power;
        if (w == 0) scale[n] = power;
      }
      for (int c = 0; c < k; ++c) {
        const float a_c = a[n * k + c] * unscale;
        const float2 v = unpack<T>(*reinterpret_cast<const uint32_t*>(x + n * kr + c * r + j * q + e));
        sum.x = fmaf(a_c, v.x, sum.x);
        sum.y = fmaf(a_c, v.y, sum.y);
      }
      if (p.center) subtract(sum, less * unscale, ubar + j * q + e);
    }
    *reinterpret_cast<uint32_t*>(z + n * (s * CHUNKS * INNER + 8) + j * CHUNKS * INNER + slot(e)) = pack<T>(sum.x, sum.y);
  }
  __syncthreads();

  multiply_and_store(Epilogue<T>(p, p.bias_in_y0 ? nullptr : p.bias), columns, p.B, z, scale, own, WARPS);
#endif
}

}  // namespace

bool fits_decode(const AdaptProblem& p) {
  return fits_tensor_cores(p.dtype, p.d, p.r, p.s, p.y0_stride, p.y0, p.y, p.B) && (!p.x || aligned(p.x)) &&
         Layout(p).bytes <= current_device().shared_per_block;
}

const char* decode_adapt(const AdaptProblem& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.N, TOKENS), tokens = std::min<int64_t>(p.N, TOKENS), d = p.d, kr = p.k * p.r;
  const int64_t gathered = tokens * std::min(2 * d, 32 * kr) + 4 * kr;
  const int splits = column_splits(tiles, gathered, 4 * tokens * d + B_bytes(p), ceil_div(d / p.s, COLUMNS * WARPS), 1.4);
  const Layout layout(p);
  return with_tensor_types(p.dtype, p.B_dtype, p.r / p.s, [&](auto t, auto b, auto chunks) {
    return launch(adapt_decode<decltype(t), decltype(b), chunks.value>, dim3(static_cast<unsigned>(tiles * splits)),
                  THREADS, layout.bytes, stream, p, splits);
  });
}

}  // namespace idlora::cuda
