#include "isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define LK_ISA avx2
#define LK_ISA_NAME "avx2"
#define LK_LANES 8
#include "isa.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
