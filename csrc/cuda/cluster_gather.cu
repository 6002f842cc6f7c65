// x_ij = c_ij (y0 - bias)[index_ij]: a warp copies 128 of a token's k r columns.
#include "idlora/cuda.h"
#include "plain.cuh"

namespace idlora::cuda {
namespace {

using namespace plain;

constexpr int LOADS = 4, PIECE = 32 * LOADS;

template <class T>
__global__ void __launch_bounds__(THREADS) cluster_gather_kernel(const GatherProblem p, int pieces) {
  const int64_t n = static_cast<int64_t>(blockIdx.x / pieces) * WARPS + warp();
  if (n >= p.N) return;
  const int first = blockIdx.x % pieces * PIECE;
  const int32_t* const index = p.index + first;
  const T* const y0 = static_cast<const T*>(p.y0) + n * p.y0_stride;
  T* const x = static_cast<T*>(p.x) + n * p.k * p.r + first;
  copy<LOADS>(
      min(PIECE, static_cast<int>(p.k * p.r) - first),
      [&](int e) {
        const int column = __ldg(index + e);
        const T v = __ldg(y0 + column);
        return moved(p, v, p.bias != nullptr, column, first + e);
      },
      [&](int e, T v) { x[e] = v; });
}

}  // namespace

const char* launch_cluster_gather(const GatherProblem& p, void* stream) {
  if (p.N == 0) return nullptr;
  const int64_t pieces = ceil_div(p.k * p.r, PIECE), blocks = ceil_div(p.N, WARPS) * pieces;
  return with_type(p.dtype, [&](auto t) {
    return launch(cluster_gather_kernel<decltype(t)>, dim3(static_cast<unsigned>(blocks)), THREADS, 0,
                  static_cast<cudaStream_t>(stream), p, static_cast<int>(pieces));
  });
}

}  // namespace idlora::cuda
