// Every header that body.h needs, before the pragma that widens the instruction set: an inline function compiled below
// it could be the one that the linker keeps for the whole program. For the same reason body.h calls no inline function
// of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#ifdef IDLORA_X86
#include <immintrin.h>
#endif
