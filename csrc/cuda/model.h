// The constants of the plans' model, of an H100 where nothing else is said. docs/fused_gemm.md and
// docs/decode.md say where each is from; none was measured here.
#pragma once

namespace lora_kernels {

constexpr double kClock = 1.6e9, kMemory = 3.0e12;  // 1/s, bytes/s
constexpr double kLaunchSeconds = 1.5e-6;           // that overlapping leaves of a second launch
constexpr double kZeroSeconds = 1e-6;   // that it leaves of the launch that zeroes flags
constexpr double kStreamBytes = 51;     // a clock, into one multiprocessor
constexpr double kDropoutClocks = 390;  // of the mask of 128x64 elements
constexpr double kItemClocks = 2000, kFlagClocks = 1500;
constexpr double kLatencySeconds = 0.8e-6;  // of memory that is busy
constexpr double kL2 = 6.0e12;              // bytes/s, into all multiprocessors
constexpr double kClusterClocks = 800;      // of two barriers of a cluster
// Of an A100, which stands for every other device.
constexpr double kClockSm80 = 1.4e9, kMemorySm80 = 1.8e12, kL2Sm80 = 4.0e12;

inline double memory_clocks(double bytes) { return bytes / kMemory * kClock; }

}  // namespace lora_kernels
