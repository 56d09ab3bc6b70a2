// The runtime and the driver, as far as launchers ask them.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#include "cudaTypedefs.h"  // named here, that a change of it is seen
#include "cuda/encode_tensor_map.cpp"
#include "cuda/launch.cpp"
#include "recorder.h"

namespace {

constexpr uint32_t kSharedDefault = 48 << 10;  // more has to be asked for

emu::Recording* recording = nullptr;
std::map<const void*, int> shared_asked_for;

// The NAME of NAME_kernel<...>.
std::string name_of(const void* function) {
  Dl_info found{};
  dladdr(function, &found);
  if (found.dli_sname == nullptr) throw emu::Error("a kernel without a name was launched");
  char* text = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = text != nullptr ? text : found.dli_sname;
  std::free(text);
  const size_t end = std::min(name.find("_kernel<"), name.find("_kernel("));
  const size_t begin = name.rfind(':', end);
  return name.substr(begin + 1, end - begin - 1);
}

// What __cluster_dims__ says.
unsigned cluster_of(const std::string& name) {
  return name == "fused_gemm_sm90" || name == "forward_sm90" || name == "backward_sm90" ? 2 : 1;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* apart, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known =
      type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (!known || rank != 2 || apart[0] != 1 || apart[1] != 1 ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || strides[0] % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  *map = emu::make_tensor_map({data, static_cast<int64_t>(sizes[0]), static_cast<int64_t>(sizes[1]),
                               static_cast<int64_t>(strides[0] / 2), static_cast<int>(box[0]),
                               static_cast<int>(box[1])});
  return CUDA_SUCCESS;
}

}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaErrorNotSupported; }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
  shared_asked_for[function] = bytes;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::string(name) != "cuTensorMapEncodeTiled" || version != 12000)
    return cudaErrorNotSupported;
  *function = reinterpret_cast<void*>(encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emu {

Recording::Recording(std::vector<Launch>& launches, int fails)
    : launches_(launches), fails_(fails) {
  recording = this;
}
Recording::~Recording() { recording = nullptr; }

cudaError_t Recording::add(const cudaLaunchConfig_t& config, const void* function,
                           std::function<void()> body) {
  Launch l;
  l.name = name_of(function);
  l.body = std::move(body);
  l.grid_x = config.gridDim.x, l.grid_y = config.gridDim.y;
  l.cluster = cluster_of(l.name);
  l.threads = config.blockDim.x;
  l.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
  if (config.stream != stream()) throw Error(l.name + " was launched on another stream");
  if (config.gridDim.z * config.blockDim.y * config.blockDim.z != 1)
    throw Error(l.name + " was launched in more dimensions than it knows");
  const auto asked = shared_asked_for.find(function);
  const uint32_t most = asked == shared_asked_for.end() ? 0 : static_cast<uint32_t>(asked->second);
  if (l.shared_bytes > std::max(most, kSharedDefault))
    throw Error(l.name + " was launched with more shared memory than was asked for");
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      l.cluster = a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z;
    else
      l.programmatic = a.val.programmaticStreamSerializationAllowed != 0;
  }
  if (l.grid_x == 0 || l.grid_y == 0 || l.grid_y > 65535 || l.grid_x % l.cluster != 0)
    throw Error(l.name + " was launched with a grid that no device takes");
  l.after = last_;
  last_ = static_cast<int>(launches_.size());
  launches_.push_back(std::move(l));
  return last_ == fails_ ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t add_launch(const cudaLaunchConfig_t& config, const void* function,
                       std::function<void()> body) {
  if (recording == nullptr) throw Error("a launch that nobody records");
  return recording->add(config, function, std::move(body));
}

}  // namespace emu
