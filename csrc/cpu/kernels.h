// The kernels of one instruction set. Each is compiled from the same source, body.h, in a file of its own: avx512.cpp,
// avx2.cpp and baseline.cpp, of which dispatch.cpp chooses one at run time.
#pragma once

#include "idlora/cpu.h"

// GCC compiles a file for more than its flags say by a pragma; elsewhere there is the baseline alone, which is NEON on
// arm64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define IDLORA_X86 1
#endif

namespace idlora::cpu {

struct Kernels {
  void (*cluster_gather)(const GatherProblem& p, const Parallel& parallel);
  void (*rb_scale)(const RbScaleProblem& p, const Parallel& parallel);
  // product = false: only y = y0 + bias.
  void (*shared_gemm)(const SharedGemmProblem& p, bool product, const Parallel& parallel);
  // z = null: all of adapt. Else z and y = y0 + bias.
  void (*adapt)(const AdaptProblem& p, float* z, const Parallel& parallel);
  // dz = null: all of adapt_backward. Else dy0 and drouter.
  void (*adapt_backward)(const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel);
};

namespace baseline {
extern const Kernels kernels;
}
#ifdef IDLORA_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace idlora::cpu
