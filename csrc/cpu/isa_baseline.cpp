// SSE2 on x86-64, NEON on aarch64: what the compiler may use without being told.
#include "isa_headers.h"

#define LK_ISA baseline
#define LK_ISA_NAME "baseline"
#define LK_LANES 4
#include "isa.inl"
