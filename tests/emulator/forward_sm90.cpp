// The sources of the sm_90a kernels that make y, compiled by g++ against the models of ptx.h.
#include "recorder.h"
// Launchers take its macro.
#include "cuda/forward_sm90.cu"
#include "cuda/fused_gemm_sm90.cu"
#include "cuda/pack.cu"
