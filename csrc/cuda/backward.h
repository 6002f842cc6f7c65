// The three launches of the tensor-core backward pass, and what they hand to one another.
#pragma once

#include <cuda_runtime.h>

#include "idlora/problems.h"

namespace idlora::cuda {

struct BackwardPlan {
  int blocks;       // of the first launch: each takes every blocks-th tile of 32 tokens and leaves one sum dT
  int token_parts;  // of the second launch: each leaves a sum dB, or writes dB itself if it is the only one
  int64_t part_tokens;
  // Byte offsets into the workspace.
  size_t z, scale, dT, dB, bytes;
};

// The first launch: dy0, z and sums of dT. float16: z is stored as z / scale, with scale 1 unless z would overflow.
const char* backward_rows(const AdaptBackwardProblem& p, const BackwardPlan& plan, cudaStream_t stream);
size_t backward_rows_shared_memory(const AdaptBackwardProblem& p);

}  // namespace idlora::cuda
