// The kernels behind the launchers of idlora/cuda.h; choose.cu chooses among them.
#pragma once

#include <cuda_runtime.h>

#include "idlora/problems.h"

namespace idlora::cuda {

// Any problem (adapt_plain.cu, backward_plain.cu).
const char* plain_shared_gemm(const SharedGemmProblem& p, cudaStream_t stream);
const char* plain_adapt(const AdaptProblem& p, cudaStream_t stream);
const char* plain_adapt_backward(const AdaptBackwardProblem& p, cudaStream_t stream);
size_t plain_adapt_backward_workspace(const AdaptBackwardProblem& p);

// float16 and bfloat16 on sm_80 and later, aligned, not too much shared memory. `fits_*` says whether a problem is such.
bool fits_prefill(const SharedGemmProblem& p);
bool fits_prefill(const AdaptProblem& p);
bool fits_decode(const AdaptProblem& p);
bool fits_tensor(const AdaptBackwardProblem& p);
const char* prefill_shared_gemm(const SharedGemmProblem& p, cudaStream_t stream);
const char* prefill_adapt(const AdaptProblem& p, cudaStream_t stream);
const char* decode_adapt(const AdaptProblem& p, cudaStream_t stream);
const char* tensor_adapt_backward(const AdaptBackwardProblem& p, cudaStream_t stream);
size_t tensor_adapt_backward_workspace(const AdaptBackwardProblem& p);

}  // namespace idlora::cuda
