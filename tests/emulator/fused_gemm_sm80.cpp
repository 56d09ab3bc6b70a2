// The source of the sm_80 kernel and its launcher, compiled by g++ against the models of ptx.h.
#include "recorder.h"
// Launchers take its macro.
#include "cuda/fused_gemm_sm80.cu"
