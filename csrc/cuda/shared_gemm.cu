// shared_gemm: y = y0 + bias + scaling * concat_j(z^(j) B^T), the last step of adapt on its own (tensor.cuh), for a z that
// comes from memory: several adapters on one layer, dropout on z.
#include "tensor.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

constexpr int TOKENS = 32, WARPS = 8, THREADS = 32 * WARPS;

int shared_bytes(int s, int q) { return TOKENS * (z_stride(s, q) * 2 + static_cast<int>(sizeof(float))); }

template <class T, class BT, int CHUNKS>
__global__ void __launch_bounds__(THREADS, CHUNKS == 2 ? 2 : 1) shared_gemm(const __grid_constant__ SharedGemmProblem p,
                                                                            int splits) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int r = p.r, s = p.s, q = r / s, ds = p.d / s, stride = s * CHUNKS * INNER + 8;
  float* const scale = reinterpret_cast<float*>(shared);
  T* const z = reinterpret_cast<T*>(scale + TOKENS);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.x % splits;
  const int64_t first = static_cast<int64_t>(blockIdx.x / splits) * TOKENS;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(TOKENS), p.N - first));
  const int groups = (ds + COLUMNS - 1) / COLUMNS, share = (groups + splits - 1) / splits;
  const int group = split * share + warp, end = min(groups, (split + 1) * share);

  BColumns<T, BT, CHUNKS> columns;
  if (group < end) columns.load(p.B, ds, q, group);
  for (int n = warp; n < TOKENS; n += WARPS) {
    const float* const row = p.z + (first + n) * r;
    float unscale = 1;
    if constexpr (std::is_same_v<T, __half>) {  // z may leave float16's range: its largest entry becomes about 1
      float largest = 0;
      for (int i = lane; n < tokens && i < r; i += 32) largest = fmaxf(largest, fabsf(row[i]));
#pragma unroll
      for (int o = 16; o; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
      const float power = exp2f(fminf(fmaxf(ceilf(log2f(largest)), -120.0f), 120.0f));
      unscale = 1 / power;
      if (lane == 0) scale[n] = power;
    }
    constexpr int HALF = CHUNKS * INNER / 2;
    for (int w = lane; w < s * HALF; w += 32) {
      const int j = w / HALF, e = 2 * (w % HALF);
      const float2 v = n < tokens && e < q ? *reinterpret_cast<const float2*>(row + j * q + e) : make_float2(0, 0);
      *reinterpret_cast<uint32_t*>(z + n * stride + j * CHUNKS * INNER + slot(e)) = pack<T>(v.x * unscale, v.y * unscale);
    }
  }
  __syncthreads();
  const Epilogue<T> epilogue{static_cast<const T*>(p.y0), static_cast<T*>(p.y), p.bias, p.N, p.d, p.y0_stride,
                             p.scaling, ds, q, s, p.bias_dtype};
  multiply_and_store(epilogue, columns, p.B, z, scale, first, tokens, group, end, WARPS);
#endif
}

}  // namespace

bool fits_prefill(const SharedGemmProblem& p) {
  return fits_tensor_cores(p.dtype, p.d, p.r, p.s, p.y0_stride, p.y0, p.y, p.B) && aligned(p.z) &&
         shared_bytes(p.s, p.r / p.s) <= current_device().shared_per_block;
}

const char* prefill_shared_gemm(const SharedGemmProblem& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.N, TOKENS), q = p.r / p.s;
  const int64_t B_bytes = p.d / p.s * q * (p.B_dtype == Dtype::float32 ? 4 : 2);
  const int splits = column_splits(tiles, 4 * TOKENS * p.r, 4 * TOKENS * p.d + B_bytes, ceil_div(p.d / p.s, COLUMNS * WARPS), 1.25);
  return with_tensor_types(p.dtype, p.B_dtype, q, [&](auto t, auto b, auto chunks) {
    return launch(shared_gemm<decltype(t), decltype(b), chunks.value>, dim3(static_cast<unsigned>(tiles * splits)), THREADS,
                  shared_bytes(p.s, q), stream, p, splits);
  });
}

}  // namespace idlora::cuda
