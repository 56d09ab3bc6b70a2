// Which launches make up a forward call, y and h from x: host code alone, so tests need no GPU.
//
//   two launches   down_proj, then fused_gemm, which starts early and waits before it reads h
//   one launch     h is work of fused_gemm's grid, whose flags are zeroed ahead (forward_sm90.cuh)
//   decode         up to 64 rows, by a kernel that streams W (decode.cuh)
//
// Around the first two, only where needed: copies of operands that TMA cannot address, and of an h
// whose rows are not on 16-byte boundaries.
#pragma once
#include <string>

#include "decode_plan.h"
#include "fused_gemm_plan.h"

namespace lora_kernels {

enum class ForwardForm { any, one_launch, two_launches, decode };
inline const char* name_of(ForwardForm form) {
  const char* names[] = {"", "one_launch", "two_launches", "decode"};
  return names[static_cast<int>(form)];
}
// By name, "" for any; false if there is none such.
inline bool form_of(const std::string& name, ForwardForm* form) {
  for (const ForwardForm f :
       {ForwardForm::any, ForwardForm::one_launch, ForwardForm::two_launches, ForwardForm::decode})
    if (name == name_of(*form = f)) return true;
  return false;
}

struct ForwardRequest {
  ForwardForm form = ForwardForm::any;
  FusedGemmRequest gemm;
  uint32_t chain = 0;  // pairs of a chain; 0: the plan chooses
  DecodeRequest decode;
};

constexpr int kForwardRanks[] = {64, 128};  // of a tile of h; A's missing rows are zero

struct ForwardPlan {
  bool served;
  const char* reason;  // why not, or why in this form
  ForwardForm form;    // never `any` if served
  int rank;            // of the tile of h: one of kForwardRanks
  FusedGemmPlan gemm;
  DownProjPlan down;  // of two launches
  TmaOperand lora_a;  // of one launch, like the next two
  Raster raster;      // with the chains of h
  unsigned clusters;
  bool h_padded;  // h is made in the workspace, in rows of gemm.h.width(), and copied out
  int64_t workspace_bytes;
  int64_t h_offset;
  int64_t sync_offset, sync_words;  // the ticket and the flags, which the launch ahead zeroes
  DecodePlan decode;
  double overhead;  // of the LoRA term over the frozen GEMM, by the model: 0.01 is 1 %
};

ForwardPlan plan_forward(const ForwardArgs& args, const Target& target,
                         const ForwardRequest& request = {});
std::string describe(const ForwardPlan& plan);

// Copies that one launch makes: each [rows, columns] matrix into `height` contiguous rows of
// `width`, zero past rows and columns.
struct PackJob {
  Matrix from;
  int64_t rows, columns;
  void* to;
  int64_t height, width;
};
constexpr int kMaxPackJobs = 5 * kMaxGroup + 1;  // backward of a group, and its x
struct PackJobs {
  PackJob jobs[kMaxPackJobs];
  int count = 0;
  void add(const TmaOperand& o, void* workspace) {
    if (!o.packed) return;
    jobs[count++] = {o.from, o.rows, o.columns, o.at(workspace).data, o.height(), o.width()};
  }
  void add(const FusedGemmPlan& plan, void* workspace) {
    for (const TmaOperand* o : {&plan.x, &plan.weight, &plan.h, &plan.up, &plan.bias})
      add(*o, workspace);
  }
};

constexpr unsigned kPackThreads = 256;
constexpr int64_t kPieceColumns = 1024;  // that a block copies at a time
LK_SHARED_FUNCTION int64_t pieces_of(const PackJob& job) {
  return (job.width + kPieceColumns - 1) / kPieceColumns;
}
// Along x; each job has as many.
unsigned pack_blocks(const PackJobs& jobs, int multiprocessors);
inline unsigned zero_blocks(uint32_t words) {
  return words / kPackThreads < 64 ? words / kPackThreads + 1 : 64;
}

// Makes the launches of fused_gemm alone, as run_forward does.
template <class Launcher>
int run_fused_gemm(const FusedGemmArgs& args, const FusedGemmPlan& plan, void* workspace,
                   Launcher& launcher) {
  if (plan.empty) return 0;
  PackJobs before;
  before.add(plan, workspace);
  const int error = before.count > 0 ? launcher.pack(before) : 0;
  return error == 0 ? launcher.fused_gemm(group_of(args, plan), workspace, false) : error;
}

// Makes the launches of a plan, in order, through `launcher`, until one does not return 0.
//
//   launcher.pack(jobs)                                 copies
//   launcher.zero(words, count)
//   launcher.down_proj(args, plan)
//   launcher.fused_gemm(group, workspace, early)        early: may start before the launch ahead of
//                                                       it ends; it waits before it reads h
//   launcher.forward(args, plan, workspace)             both in one; early too: it waits before it
//                                                       takes a ticket
//   launcher.decode(args, plan)
template <class Launcher>
int run_forward(ForwardArgs args, ForwardPlan plan, void* workspace, Launcher& launcher) {
  if (plan.form == ForwardForm::decode)
    return plan.decode.empty ? 0 : launcher.decode(args, plan.decode);
  auto* bytes = static_cast<uint8_t*>(workspace);
  const bool one = plan.form == ForwardForm::one_launch, adapted = args.down.r > 0;
  PackJobs before, after;
  before.add(plan.gemm, workspace);
  if (one) before.add(plan.lora_a, workspace);
  if (plan.gemm.x.packed) args.down.x = plan.gemm.x.at(workspace);
  if (plan.h_padded) {
    const Matrix out = args.down.h;
    args.down.h = {bytes + plan.h_offset, plan.gemm.h.width(), 1, out.dtype};
    after.jobs[after.count++] = {args.down.h, args.down.M, args.down.r,
                                 out.data,    args.down.M, args.down.r};
  }
  plan.gemm.h.from = args.gemm.h = args.down.h;

  int error = before.count > 0 ? launcher.pack(before) : 0;
  if (one) {
    auto* sync = reinterpret_cast<uint32_t*>(bytes + plan.sync_offset);
    if (error == 0) error = launcher.zero(sync, static_cast<uint32_t>(plan.sync_words));
    if (error == 0) error = launcher.forward(args, plan, workspace);
  } else {
    if (error == 0 && adapted) error = launcher.down_proj(args.down, plan.down);
    if (error == 0 && !plan.gemm.empty)
      error = launcher.fused_gemm(group_of(args.gemm, plan.gemm), workspace, adapted);
  }
  if (error == 0 && after.count > 0) error = launcher.pack(after);
  return error;
}

}  // namespace lora_kernels
