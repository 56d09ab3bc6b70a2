// The CUDA operators on CPU tensors: everything of csrc/torch is as it is on a GPU, plans too, and
// only what a launch does is done by the CPU kernels. Registered for every device, in a namespace
// of its own.
#include "csrc/torch/library.h"  // before the name of the key changes
#define CUDA CompositeExplicitAutograd

#include "csrc/torch/cuda.cpp"
#define request_of backward_request_of
#include "csrc/torch/cuda_backward.cpp"
#include "csrc/torch/cuda_group.cpp"
