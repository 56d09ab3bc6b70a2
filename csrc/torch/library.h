#pragma once
// Where the C++ kernels are registered: the namespace of lora_kernels/_ops.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>
#include <string>

// Of torch 2.13 and newer; weak, so that the same binary also loads beside an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

#ifdef LK_HUB  // kernel-builder gives each of its builds a name (build.toml)
#define LK_NAMESPACE TORCH_EXTENSION_NAME
#else
#define LK_NAMESPACE lora_kernels
#endif

// STABLE_TORCH_LIBRARY_IMPL pastes its arguments: one more level expands LK_NAMESPACE first.
#define LK_LIBRARY_IMPL_IN(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define LK_LIBRARY_IMPL(key, m) LK_LIBRARY_IMPL_IN(LK_NAMESPACE, key, m)

// TORCH_BOX, with torch's own words for a call into torch that fails.
#define LK_BOX(function) lora_kernels::in_torchs_words<TORCH_BOX(function)>

namespace lora_kernels {

// The stable ABI says of a call into torch only that it failed and where. What callers look for,
// "CUDA out of memory" above all, has to be fetched.
template <void (*kBoxed)(StableIValue*, uint64_t, uint64_t)>
void in_torchs_words(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  try {
    kBoxed(stack, arguments, outputs);
  } catch (const std::exception& error) {
    const bool has_words = torch_exception_get_what_without_backtrace != nullptr;
    if (!has_words || std::strstr(error.what(), " API call failed at ") == nullptr) throw;
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

}  // namespace lora_kernels
