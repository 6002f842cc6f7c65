// Vectors of 512 bits.
#include "cpu/includes.h"

#ifdef IDLORA_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define IDLORA_ISA avx512
#define IDLORA_WIDTH 16
#include "cpu/body.h"
#endif
