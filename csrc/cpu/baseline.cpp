// Vectors of 128 bits: SSE2, NEON or whatever the compiler makes of them.
#include "cpu/includes.h"

#define IDLORA_ISA baseline
#define IDLORA_WIDTH 4
#include "cpu/body.h"
