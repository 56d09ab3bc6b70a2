// Errors of torch in torch's own words.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>

// Of torch 2.13 and newer; weak, so that the same binary also loads beside an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// TORCH_BOX of an op, for registration.
#define LK_BOX(function) in_torchs_words<TORCH_BOX(function)>

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
