// The kernels as a C library: ctypes, C++ tools, ncu. The structs are those of problems.h; a mirror of one in another
// language compares its size with idlora_sizeof. The CUDA functions take a cudaStream_t and return null, or a message that
// says what went wrong.
#include <cstring>

#include "idlora/cpu.h"
#include "idlora/cuda.h"

using namespace idlora;

namespace {

// Tools bring threads of their own, or none.
const cpu::Parallel ONE_THREAD{1, [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
                                 if (n > 0) body(context, 0, n);
                               }};

}  // namespace

extern "C" {

// 0: no such struct.
size_t idlora_sizeof(const char* name) {
  if (!std::strcmp(name, "GatherProblem")) return sizeof(GatherProblem);
  if (!std::strcmp(name, "RbScaleProblem")) return sizeof(RbScaleProblem);
  if (!std::strcmp(name, "SharedGemmProblem")) return sizeof(SharedGemmProblem);
  if (!std::strcmp(name, "AdaptProblem")) return sizeof(AdaptProblem);
  if (!std::strcmp(name, "AdaptBackwardProblem")) return sizeof(AdaptBackwardProblem);
  return 0;
}

// On one thread, host memory.
void idlora_cpu_cluster_gather(const GatherProblem* p) { cpu::cluster_gather(*p, ONE_THREAD); }
void idlora_cpu_rb_scale(const RbScaleProblem* p) { cpu::rb_scale(*p, ONE_THREAD); }
void idlora_cpu_shared_gemm(const SharedGemmProblem* p) { cpu::shared_gemm(*p, ONE_THREAD); }
void idlora_cpu_adapt(const AdaptProblem* p) { cpu::adapt(*p, ONE_THREAD); }
void idlora_cpu_adapt_backward(const AdaptBackwardProblem* p) { cpu::adapt_backward(*p, ONE_THREAD); }

#ifdef IDLORA_CUDA
const char* idlora_cluster_gather(const GatherProblem* p, void* stream) {
  return cuda::launch_cluster_gather(*p, stream);
}
const char* idlora_rb_scale(const RbScaleProblem* p, void* stream) { return cuda::launch_rb_scale(*p, stream); }
const char* idlora_shared_gemm(const SharedGemmProblem* p, void* stream) {
  return cuda::launch_shared_gemm(*p, stream);
}
const char* idlora_adapt(const AdaptProblem* p, void* stream) { return cuda::launch_adapt(*p, stream); }
const char* idlora_adapt_backward(const AdaptBackwardProblem* p, void* stream) {
  return cuda::launch_adapt_backward(*p, stream);
}
size_t idlora_adapt_backward_workspace(const AdaptBackwardProblem* p) { return cuda::adapt_backward_workspace(*p); }

// The Variant that `automatic` stands for.
int idlora_choose_shared_gemm(const SharedGemmProblem* p) { return static_cast<int>(cuda::choose(*p)); }
int idlora_choose_adapt(const AdaptProblem* p) { return static_cast<int>(cuda::choose(*p)); }
int idlora_choose_adapt_backward(const AdaptBackwardProblem* p) { return static_cast<int>(cuda::choose(*p)); }
#endif

}  // extern "C"
