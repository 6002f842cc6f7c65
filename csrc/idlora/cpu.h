// The kernels on the CPU: what the launch_* of cuda.h compute, with the caller's thread pool and memory for its outputs.
//
// Every result is the same, bit for bit, whatever the number of threads: a sum over tokens has an order of its own.
#pragma once

#include "idlora/problems.h"

namespace idlora::cpu {

// The caller's thread pool. `run` calls body(context, begin, end) for parts of [0, n) of at least `grain`, in parallel.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t n, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

void cluster_gather(const GatherProblem& p, const Parallel& parallel);
void rb_scale(const RbScaleProblem& p, const Parallel& parallel);
void shared_gemm(const SharedGemmProblem& p, const Parallel& parallel);
void adapt(const AdaptProblem& p, const Parallel& parallel);
// `workspace` is not used.
void adapt_backward(const AdaptBackwardProblem& p, const Parallel& parallel);

// Whether a caller with a matrix product of its own should multiply by B itself: in bfloat16, of which processors
// with instructions for it make twice the products of float32 and more, once there is enough of it.
bool prefers_gemm_forward(Dtype dtype, int64_t N, int64_t d, int64_t q);
bool prefers_gemm_backward(Dtype dtype, int64_t N, int64_t d, int64_t q);

// For such a caller. What comes before its product: z [N, r], and y = y0 + bias.
void adapt_before_gemm(const AdaptProblem& p, float* z, const Parallel& parallel);
void shared_gemm_before_gemm(const SharedGemmProblem& p, const Parallel& parallel);
// What comes after dz [N, r] (dtype; scaled) and dB: dy0 and drouter.
void adapt_backward_after_gemm(const AdaptBackwardProblem& p, const void* dz, const Parallel& parallel);

// The instruction set in use: "avx512", "avx2" or "baseline", the best that the processor has. The environment variable
// IDLORA_CPU_CAPABILITY asks for a lower one.
const char* capability();

}  // namespace idlora::cpu
