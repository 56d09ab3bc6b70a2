// What every launch needs of the runtime.
#pragma once
#include <cuda_runtime_api.h>

#include <type_traits>

#include "down_proj_plan.h"

namespace lora_kernels {

// The device as plans see it. `device` is the current one.
cudaError_t device_target(int device, Target* target);
// Whether the library holds code for sm_90a.
bool built_with_sm90a();

// Launches a kernel in clusters of so many blocks along x; `early`: once all blocks of the launch
// ahead of it allow that, instead of after its end. A failure is not left behind as the thread's
// last error, where the next good launch would find it.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads,
                            int shared_bytes, cudaStream_t stream, bool early,
                            const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...), "arguments are not converted");
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const void* pointers[] = {&arguments...};
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)  // more than that has to be asked for
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernelExC(&config, function, const_cast<void**>(pointers));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
// One whose source gives its clusters, or that has none.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                          cudaStream_t stream, bool early, const Arguments&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, early, arguments...);
}

}  // namespace lora_kernels
