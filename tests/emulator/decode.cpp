// The source of the decode kernel, compiled by g++ against the models of ptx.h, and its plan.
#include "recorder.h"
// Launchers take its macro.
#include "cuda/decode.cu"
#include "cuda/decode_plan.cpp"
