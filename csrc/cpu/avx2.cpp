// Vectors of 256 bits.
#include "cpu/includes.h"

#ifdef IDLORA_X86
#pragma GCC target("avx2,fma,f16c")
#define IDLORA_ISA avx2
#define IDLORA_WIDTH 8
#include "cpu/body.h"
#endif
