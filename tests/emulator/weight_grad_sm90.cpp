// The sources of weight_grad and of its sums, compiled by g++ against the models of ptx.h.
#include "recorder.h"
// Launchers take its macro.
#include "cuda/reduce.cu"
#include "cuda/weight_grad_sm90.cu"
