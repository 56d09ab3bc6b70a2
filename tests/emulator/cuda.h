// What nvcc knows by itself, for g++.
#pragma once
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

namespace emu {
inline Dim thread_index() { return {static_cast<unsigned>(warp().index * 32 + self().lane), 0, 0}; }
inline Dim block_index() { return {block().index_x, block().index_y, 0}; }
inline Dim grid_size() {
  const Launch& l = *block().grid->launch;
  return {l.grid_x, l.grid_y, 1};
}
}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define gridDim (::emu::grid_size())
