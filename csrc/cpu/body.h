// The kernels, compiled for the instruction set of the file that includes this.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace idlora::cpu::IDLORA_ISA {

const Kernels kernels{cluster_gather, rb_scale, shared_gemm, adapt, adapt_backward};

}  // namespace idlora::cpu::IDLORA_ISA
