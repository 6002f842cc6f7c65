// z = sum_i a_i x_i, a_i = <T_i, x_i>, perhaps centred: a warp a token.
#include "idlora/cuda.h"
#include "plain.cuh"

namespace idlora::cuda {
namespace {

using namespace plain;

template <class T>
__global__ void __launch_bounds__(THREADS) rb_scale_kernel(const RbScaleProblem p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * WARPS + warp();
  if (n >= p.N) return;
  const T* const x = static_cast<const T*>(p.x) + n * p.k * p.r;
  float* const z = p.z + n * p.r;
  route<T>(
      p, p.center, p.k, [&](int e) { return to_float(__ldg(x + e)); },
      [&](int e, float value, bool first) { z[e] = first ? value : z[e] + value; });
}

}  // namespace

const char* launch_rb_scale(const RbScaleProblem& p, void* stream) {
  if (p.N == 0) return nullptr;
  return with_type(p.dtype, [&](auto t) {
    return launch(rb_scale_kernel<decltype(t)>, dim3(static_cast<unsigned>(ceil_div(p.N, WARPS))), THREADS, 0,
                  static_cast<cudaStream_t>(stream), p);
  });
}

}  // namespace idlora::cuda
