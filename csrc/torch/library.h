#pragma once
// Where the C++ kernels are registered: the namespace of lora_kernels/_ops.py.
#include <torch/csrc/stable/library.h>

#ifdef LK_HUB  // kernel-builder gives each of its builds a name (build.toml)
#define LK_NAMESPACE TORCH_EXTENSION_NAME
#else
#define LK_NAMESPACE lora_kernels
#endif

// STABLE_TORCH_LIBRARY_IMPL pastes its arguments: one more level expands LK_NAMESPACE first.
#define LK_LIBRARY_IMPL_IN(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define LK_LIBRARY_IMPL(key, m) LK_LIBRARY_IMPL_IN(LK_NAMESPACE, key, m)
