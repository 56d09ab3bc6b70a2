// The launchers of csrc/cuda, compiled by g++: what they launch becomes launches of the emulator.
#pragma once
#include "cuda_runtime_api.h"

#include "kernels.h"

namespace emu {

// While it lives, launches on its stream go behind what is there, as a stream of its own.
class Recording {
 public:
  // `fails`: the number of a launch that fails.
  Recording(std::vector<Launch>& launches, int fails = -1);
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(this); }
  cudaError_t add(const cudaLaunchConfig_t& config, const void* function,
                  std::function<void()> body);
  // Of a launcher, which returns an error if a launch failed and else none.
  void done(cudaError_t error) const {
    const bool failed = fails_ >= 0 && last_ == fails_;
    if ((error != cudaSuccess) != failed)
      throw Error("the launcher returned error " + std::to_string(error));
  }

 private:
  std::vector<Launch>& launches_;
  int fails_, last_ = -1;  // index of the launch before
};
cudaError_t add_launch(const cudaLaunchConfig_t& config, const void* function,
                       std::function<void()> body);

template <class... Parameters, class... Arguments>
cudaError_t record(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  return add_launch(config, reinterpret_cast<const void*>(kernel), [=] { kernel(arguments...); });
}

}  // namespace emu

// In launch_clusters (csrc/cuda/launch.h), where the kernel and its arguments still have types.
#define cudaLaunchKernelExC(config, function, pointers) \
  ((void)(function), (void)(pointers), ::emu::record(*(config), kernel, arguments...))
