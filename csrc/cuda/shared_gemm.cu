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
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Share own = share_of_block<TOKENS>(p.N, ds, splits);
  const int64_t first = own.first;
  const int tokens = own.tokens;

  BColumns<T, BT, CHUNKS> columns;
  if (own.group < own.end) columns.load(p.B, ds, q, own.group);
  for (int n = warp; n < TOKENS; n += WARPS) {
    const float* const row = p.z + (first + n) * r;
    float unscale = 1;
    if constexpr (std::is_same_v<T, __half>) {  // z's largest entry becomes about 1
      float largest = 0;
      for (int i = lane; n < tokens && i < r; i += 32) largest = fmaxf(largest, fabsf(row[i]));
#pragma unroll
      for (int o = 16; o; o /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
      const float power = power_of_two_above(largest);
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
  multiply_and_store(Epilogue<T>(p, p.bias), columns, p.B, z, scale, own, WARPS);
#endif
}

}  // namespace

bool fits_prefill(const SharedGemmProblem& p) {
  return fits_tensor_cores(p.dtype, p.d, p.r, p.s, p.y0_stride, p.y0, p.y, p.B) && aligned(p.z) &&
         shared_bytes(p.s, p.r / p.s) <= current_device().shared_per_block;
}

const char* prefill_shared_gemm(const SharedGemmProblem& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.N, TOKENS), q = p.r / p.s, most = ceil_div(p.d / p.s, COLUMNS * WARPS);
  const int splits = column_splits(tiles, 4 * TOKENS * p.r, 4 * TOKENS * p.d + B_bytes(p), most, 1.25);
  return with_tensor_types(p.dtype, p.B_dtype, q, [&](auto t, auto b, auto chunks) {
    return launch(shared_gemm<decltype(t), decltype(b), chunks.value>, dim3(static_cast<unsigned>(tiles * splits)), THREADS,
                  shared_bytes(p.s, q), stream, p, splits);
  });
}

}  // namespace idlora::cuda
