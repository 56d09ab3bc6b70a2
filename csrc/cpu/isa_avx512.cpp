#include "isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define LK_ISA avx512
#define LK_ISA_NAME "avx512"
#define LK_LANES 16
#include "isa.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
