// The source of the kernel that does the whole backward pass, compiled by g++ against the models of
// ptx.h.
#include "recorder.h"
// Launchers take its macro.
#include "cuda/backward_sm90.cu"
