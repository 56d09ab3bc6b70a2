// Sums of partial results in a fixed order: what makes gradients deterministic without atomics.
#pragma once
#include "../lora.h"

namespace lora_kernels {

// to [rows, columns] = scale * the sum over `count` matrices [rows, pitch] of fp32 that lie one
// after another, pitch a multiple of 4; rounded once.
struct ReduceJob {
  const float* partials;
  int64_t count, rows, columns, pitch;
  Matrix to;
  float scale;
};
constexpr int kMaxReduceJobs = 4;
struct ReduceJobs {
  ReduceJob jobs[kMaxReduceJobs];
  int count = 0;
  void add(const ReduceJob& job) {
    if (job.rows > 0 && job.columns > 0) jobs[count++] = job;
  }
};

// The row length of a partial result: columns are added in fours.
inline int64_t reduce_pitch(int64_t columns) { return (columns + 3) / 4 * 4; }

constexpr unsigned kReduceThreads = 256;
// Blocks along x; each job has as many.
inline unsigned reduce_blocks(const ReduceJobs& jobs, int multiprocessors) {
  int64_t most = 1;
  for (int i = 0; i < jobs.count; ++i) {
    const int64_t blocks =
        (jobs.jobs[i].rows * jobs.jobs[i].pitch / 4 + kReduceThreads - 1) / kReduceThreads;
    most = blocks > most ? blocks : most;
  }
  const int64_t room = 8 * int64_t{multiprocessors};  // as many as are resident
  return static_cast<unsigned>(most < room ? most : room);
}

}  // namespace lora_kernels
