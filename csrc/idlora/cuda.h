// The kernels on CUDA. Every launch is asynchronous on `stream` (a cudaStream_t), allocates nothing, synchronises
// nothing, uses no atomics on floats, and returns null, or a message that says what went wrong.
#pragma once

#include <cstddef>

#include "idlora/problems.h"

namespace idlora::cuda {

const char* launch_cluster_gather(const GatherProblem& p, void* stream);
const char* launch_rb_scale(const RbScaleProblem& p, void* stream);
const char* launch_shared_gemm(const SharedGemmProblem& p, void* stream);
const char* launch_adapt(const AdaptProblem& p, void* stream);
const char* launch_adapt_backward(const AdaptBackwardProblem& p, void* stream);
size_t adapt_backward_workspace(const AdaptBackwardProblem& p);

// What `automatic` chooses for the problem on the current device.
Variant choose(const SharedGemmProblem& p);
Variant choose(const AdaptProblem& p);
Variant choose(const AdaptBackwardProblem& p);

}  // namespace idlora::cuda
