// The gradient of adapt on tensor cores, second and third launch: dB = scaling sum_n sum_j dy^(j) z^(j)^T, and the final
// sums. Every sum has a fixed order, whatever the schedule.
//
// A block takes 64 rows of B (columns of every part of dy) and a range of tokens; dy and z pass through a ring in shared
// memory. Both are read transposed, for the sum runs over tokens.
#include "backward.h"
#include "tensor.cuh"
#include "variants.h"

namespace idlora::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SLICE = 64, STAGE = 32, STAGES = 3;       // rows of B; tokens in a stage
constexpr int DY_STRIDE = SLICE + 8;                    // an odd number of 16-byte units, like z's
__host__ __device__ constexpr int z_row(int r) { return (r / 8 | 1) * 8; }
__host__ __device__ constexpr int stage_bytes(int r, int s) {
  return STAGE * ((s * DY_STRIDE + z_row(r)) * 2 + static_cast<int>(sizeof(float)));
}

template <class T, int CHUNKS>
__global__ void __launch_bounds__(THREADS, 2) adapt_backward_shared(const __grid_constant__ AdaptBackwardProblem p,
                                                                 const __grid_constant__ BackwardPlan plan) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char shared[];
  const int r = p.r, s = p.s, q = r / s, ds = p.d / s;
  const int slices = (ds + SLICE - 1) / SLICE;
  const int slice = blockIdx.x % slices * SLICE, part = blockIdx.x / slices;
  const int64_t first = part * plan.part_tokens, last = min(p.N, first + plan.part_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* const z = reinterpret_cast<const T*>(static_cast<const char*>(p.workspace) + plan.z);
  const float* const scale = reinterpret_cast<const float*>(static_cast<const char*>(p.workspace) + plan.scale);

  auto fill = [&](int stage, int64_t n0) {
    T* const dy_to = reinterpret_cast<T*>(shared + stage * stage_bytes(r, s));
    T* const z_to = dy_to + STAGE * s * DY_STRIDE;
    const int n = threadIdx.x / 8, unit = threadIdx.x % 8;  // 8 threads a token
    const bool valid = n0 + n < last, inside = valid && slice + 8 * unit < ds;
    const T* from = static_cast<const T*>(p.dy) + (inside ? (n0 + n) * p.dy_stride + slice + 8 * unit : 0);
    for (int j = 0; j < s; ++j, from += inside ? ds : 0)
      copy_async<16>(dy_to + (j * STAGE + n) * DY_STRIDE + 8 * unit, from, inside);
    for (int i = 8 * unit; i < r; i += 64)
      copy_async<16>(z_to + n * z_row(r) + i, z + (valid ? (n0 + n) * r + i : 0), valid);
    if constexpr (std::is_same_v<T, __half>) {
      float* const scale_to = reinterpret_cast<float*>(z_to + STAGE * z_row(r));
      if (unit == 0) copy_async<4>(scale_to + n, scale + (valid ? n0 + n : 0), valid);
    }
    commit_copies();
  };

  // The warp's 16 rows of B, and every second 32 of its columns.
  const int row = warp % 4 * 16, way = warp / 4;
  float c[CHUNKS / 2][4][4] = {};
  const int stages = static_cast<int>((last - first + STAGE - 1) / STAGE);
  for (int st = 0; st < STAGES - 1; ++st) {
    if (st < stages) fill(st, first + static_cast<int64_t>(st) * STAGE);
    else commit_copies();
  }
  for (int st = 0; st < stages; ++st) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (st + STAGES - 1 < stages) fill((st + STAGES - 1) % STAGES, first + static_cast<int64_t>(st + STAGES - 1) * STAGE);
    else commit_copies();
    const T* const dy_stage = reinterpret_cast<const T*>(shared + st % STAGES * stage_bytes(r, s));
    const T* const z_stage = dy_stage + STAGE * s * DY_STRIDE;
    for (int j = 0; j < s; ++j)
#pragma unroll
      for (int n = 0; n < STAGE; n += 16) {
        uint32_t a[4];
        ldmatrix_transposed(a, dy_stage + (j * STAGE + n + lane % 8 + lane / 16 * 8) * DY_STRIDE + row + lane / 8 % 2 * 8);
        if constexpr (std::is_same_v<T, __half>) {  // z was stored divided by a power of two
          const float* const scales = reinterpret_cast<const float*>(z_stage + STAGE * z_row(r)) + n + lane % 4 * 2;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const __half2 factor = __floats2half2_rn(scales[i / 2 * 8], scales[i / 2 * 8 + 1]);
            const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a[i]), factor);
            a[i] = reinterpret_cast<const uint32_t&>(product);
          }
        }
#pragma unroll
        for (int h = 0; h < CHUNKS / 2; ++h)
#pragma unroll
          for (int m = 0; m < 4; m += 2) {
            const int column = (2 * h + way) * INNER + 8 * m;
            if (column < q) {
              uint32_t b[4];
              // Where q ends in the middle of a pair of tiles the second repeats the first, and is not used.
              ldmatrix_transposed(b, z_stage + (n + lane % 16) * z_row(r) + j * q + column + (column + 8 < q ? lane / 16 * 8 : 0));
              mma<T>(c[h][m], a, b[0], b[1]);
              mma<T>(c[h][m + 1], a, b[2], b[3]);
            }
          }
      }
  }

  // Two neighbouring tiles make 16 columns; two neighbouring lanes swap halves, so that each has four in a row.
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.dB) + static_cast<int64_t>(part) * ds * q;
  const int odd = lane % 2;
#pragma unroll
  for (int h = 0; h < CHUNKS / 2; ++h)
#pragma unroll
    for (int m = 0; m < 4; m += 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float own[2], other[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float lo = c[h][m][2 * half + e], hi = c[h][m + 1][2 * half + e];
          own[e] = p.scaling * (odd ? hi : lo);
          other[e] = p.scaling * __shfl_xor_sync(~0u, odd ? lo : hi, 1);
        }
        const float4 v = odd ? make_float4(other[0], other[1], own[0], own[1]) : make_float4(own[0], own[1], other[0], other[1]);
        const int column = (2 * h + way) * INNER + 8 * (m + odd) + lane % 4 / 2 * 4, B_row = slice + row + lane / 4 + 8 * half;
        if (column >= q || B_row >= ds) continue;
        const int64_t at = static_cast<int64_t>(B_row) * q + column;
        if (plan.token_parts > 1 || p.B_dtype == Dtype::float32) {
          float* const to = plan.token_parts > 1 ? sums : static_cast<float*>(p.dB);
          *reinterpret_cast<float4*>(to + at) = v;
        } else {
          *reinterpret_cast<uint2*>(static_cast<T*>(p.dB) + at) = make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w));
        }
      }
#endif
}

// Blocks below `dB_blocks` sum dB, one element a thread; the others dT, one element a lane, shared out over the warps.
__global__ void __launch_bounds__(THREADS) adapt_backward_sums(const __grid_constant__ AdaptBackwardProblem p,
                                                               const __grid_constant__ BackwardPlan plan, int dB_blocks) {
  const char* const workspace = static_cast<const char*>(p.workspace);
  if (static_cast<int>(blockIdx.x) < dB_blocks) {
    const int64_t size = p.d / p.s * (p.r / p.s), i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < plan.token_parts; ++part) sum += reinterpret_cast<const float*>(workspace + plan.dB)[part * size + i];
    store_from_float(p.dB, p.B_dtype, i, sum);
  } else {
    __shared__ float shares[WARPS][32];
    const int64_t size = router_size(p);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t i = (static_cast<int64_t>(blockIdx.x) - dB_blocks) * 32 + lane;
    float sum = 0;
    if (i < size)
      for (int b = warp; b < plan.blocks; b += WARPS) sum += reinterpret_cast<const float*>(workspace + plan.dT)[b * size + i];
    shares[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || i >= size) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += shares[w][lane];
    store_from_float(p.drouter, p.router_dtype, i, sum);
  }
}

BackwardPlan plan_backward(const AdaptBackwardProblem& p) {
  BackwardPlan plan{};
  const int sms = current_device().sms;
  const int64_t tiles = ceil_div(p.N, 32), slices = ceil_div(p.d / p.s, SLICE);
  plan.blocks = static_cast<int>(std::min<int64_t>(tiles, 8 * sms));
  // As many parts as fill the SMs, with at least 384 tokens each: a part costs a sum of the size of dB.
  plan.token_parts = static_cast<int>(std::max<int64_t>(1, std::min(sms / slices, p.N / 384)));
  plan.part_tokens = round_up(ceil_div(p.N, plan.token_parts), STAGE);
  size_t bytes = 0;
  auto take = [&bytes](size_t size) {
    const size_t offset = bytes;
    bytes += round_up(size, 256);
    return offset;
  };
  plan.z = take(p.N * p.r * 2);
  plan.scale = take(p.dtype == Dtype::float16 ? p.N * sizeof(float) : 0);
  plan.dT = take(plan.blocks * router_size(p) * sizeof(float));
  plan.dB = take(plan.token_parts > 1 ? plan.token_parts * (p.d / p.s) * (p.r / p.s) * sizeof(float) : 0);
  plan.bytes = bytes;
  return plan;
}

const char* backward_shared(const AdaptBackwardProblem& p, const BackwardPlan& plan, cudaStream_t stream) {
  const int slices = static_cast<int>(ceil_div(p.d / p.s, SLICE)), shared = STAGES * stage_bytes(p.r, p.s);
  return with_tensor_types(p.dtype, p.dtype, p.r / p.s, [&](auto t, auto, auto chunks) {
    return launch(adapt_backward_shared<decltype(t), chunks.value>, dim3(slices * plan.token_parts), THREADS, shared, stream,
                  p, plan);
  });
}

const char* backward_sums(const AdaptBackwardProblem& p, const BackwardPlan& plan, cudaStream_t stream) {
  const int dB_blocks = plan.token_parts > 1 ? static_cast<int>(ceil_div(p.d / p.s * (p.r / p.s), THREADS)) : 0;
  const int dT_blocks = static_cast<int>(ceil_div(router_size(p), 32));
  return launch(adapt_backward_sums, dim3(dB_blocks + dT_blocks), THREADS, 0, stream, p, plan, dB_blocks);
}

}  // namespace

bool fits_tensor(const AdaptBackwardProblem& p) {
  return p.N > 0 && p.s <= 4 && p.r < 65536 && fits_tensor_cores(p.dtype, p.d, p.r, p.s, p.dy_stride, p.dy, p.dy0, p.B) &&
         aligned(p.x) && aligned(p.dB) &&
         backward_rows_shared_memory(p) <= static_cast<size_t>(current_device().shared_per_block) &&
         STAGES * stage_bytes(p.r, p.s) <= current_device().shared_per_block;
}

size_t tensor_adapt_backward_workspace(const AdaptBackwardProblem& p) { return plan_backward(p).bytes; }

const char* tensor_adapt_backward(const AdaptBackwardProblem& p, cudaStream_t stream) {
  const BackwardPlan plan = plan_backward(p);
  if (const char* error = backward_rows(p, plan, stream)) return error;
  if (const char* error = backward_shared(p, plan, stream)) return error;
  return backward_sums(p, plan, stream);
}

}  // namespace idlora::cuda
