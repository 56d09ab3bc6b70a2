// Sums of partial results in a fixed order: what makes gradients deterministic without atomics.
#pragma once
#include "../lora.h"

namespace lora_kernels {

// to [rows, columns] = scale * the sum over `count` matrices [rows, pitch] of fp32 that lie one
// after another, of the first columns of each, pitch a multiple of 4; rounded once.
struct ReduceJob {
  const float* partials;
  int64_t count, rows, columns, pitch;
  Matrix to;
  float scale;
};
constexpr int kMaxReduceJobs = 3 * kMaxGroup;  // gradients of A, of B, of the bias
struct ReduceJobs {
  ReduceJob jobs[kMaxReduceJobs];
  int count = 0;
  void add(const ReduceJob& job) {
    if (job.rows > 0 && job.columns > 0) jobs[count++] = job;
  }
};

// Columns are added in fours, so rows of a partial result have a multiple of 4.
inline int64_t fours_of(int64_t columns) { return (columns + 3) / 4; }
inline int64_t reduce_pitch(int64_t columns) { return fours_of(columns) * 4; }

constexpr unsigned kReduceThreads = 256;
// Blocks along x; each job has as many.
inline unsigned reduce_blocks(const ReduceJobs& jobs, int multiprocessors) {
  int64_t most = 1;
  for (int i = 0; i < jobs.count; ++i) {
    const ReduceJob& job = jobs.jobs[i];
    const int64_t blocks = (job.rows * fours_of(job.columns) + kReduceThreads - 1) / kReduceThreads;
    most = blocks > most ? blocks : most;
  }
  const int64_t room = 8 * int64_t{multiprocessors};  // as many as are resident
  return static_cast<unsigned>(most < room ? most : room);
}

}  // namespace lora_kernels
