// What nvcc knows by itself, for g++.
#pragma once
#include "async.h"
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
// No macro, for a launch has a member of that name.
struct GridSize {
  struct {
    operator unsigned() const { return block().grid->launch->grid_x; }
  } x;
};
inline GridSize gridDim;
}  // namespace emu

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
using emu::gridDim;
using CUtensorMap = emu::TensorMap;
