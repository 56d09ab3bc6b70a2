// Small kernels, each right and, with `wrong`, with one mistake that the emulator has to report.
// They test the rules of the emulator itself, one rule a kernel.
#include "misuse.h"

#include <algorithm>

#include "misuse_patterns.h"

namespace emu {
namespace {

struct Case {
  const char* name;
  void (*kernel)(bool);
  const char* report;
  unsigned blocks = 1, cluster = 1, threads = 128;
  bool dependent = false;
};
#define CASE(kernel, ...) {#kernel, kernel, __VA_ARGS__}
const Case kCases[] = {
    CASE(mbarrier_never_completes, "deadlock"),
    CASE(wrong_phase, "race|uninitialised"),
    CASE(too_few_bytes, "race|uninitialised|deadlock"),
    CASE(too_many_arrivals, "more arrivals"),
    CASE(barrier_not_initialised, "not initialised"),
    CASE(barrier_init_not_fenced, "fence.mbarrier_init"),
    CASE(threads_disagree_on_a_barrier, "barrier misuse|deadlock"),
    CASE(lanes_diverge, "different collective"),
    CASE(shared_out_of_bounds, "out of bounds"),
    CASE(shared_uninitialised, "uninitialised"),
    CASE(shared_race, "race|uninitialised"),
    CASE(global_out_of_bounds, "out of bounds"),
    CASE(global_uninitialised, "uninitialised"),
    CASE(two_blocks_write_the_same, "race", 2),
    CASE(input_written, "input overwritten"),
    CASE(flag_before_data, "race|uninitialised", 2),
    CASE(flag_before_barrier, "race|uninitialised", 2),
    CASE(stored_before_fence, "missing proxy fence"),
    CASE(stored_before_barrier, "race|uninitialised"),
    CASE(overwritten_while_stored, "race"),
    CASE(exit_before_store_is_read, "exits with bulk stores"),
    CASE(wgmma_before_fence_of_proxy, "missing proxy fence"),
    CASE(wgmma_without_fence, "wgmma.fence"),
    CASE(wgmma_not_waited_for, "exits with wgmma"),
    CASE(wgmma_of_other_warps_differs, "different instructions"),
    CASE(slot_released_early, "race"),
    CASE(accumulators_read_early, "a NaN in place of a sum"),
    CASE(cp_async_not_waited_for, "race|uninitialised"),
    CASE(misaligned_copy, "misaligned"),
    CASE(misaligned_matrix, "misaligned"),
    CASE(load_of_a_column_off_16_bytes, "misaligned: TMA load"),
    CASE(store_to_a_column_off_16_bytes, "misaligned: TMA store"),
    CASE(store_past_the_end_of_a_row, "race"),
    CASE(registers_past_the_pool, "deadlock.*free registers", 1, 1, 384),
    CASE(arrival_at_a_block_that_exited, "exited", 2, 2),
    CASE(cluster_not_synchronised, "race|not initialised|ordered", 2, 2),
    CASE(grid_needs_all_blocks_at_once, "deadlock", 4),
    CASE(dependent_reads_early, "race|uninitialised", 1, 1, 128, true),
    CASE(ticket_taken_early, "race", 1, 1, 128, true),
    CASE(sums_of_warps, "race|uninitialised"),
    CASE(half_written, "uninitialised"),
    CASE(barriers_of_two_warps, "initialised twice|race"),
    CASE(barrier_overwritten, "over an mbarrier"),
    CASE(init_as_in_the_guide, "fence.mbarrier_init"),
    CASE(load_never_waited_for, "without knowing of a TMA load"),
    CASE(sync_after_some_exited, "deadlock"),
    CASE(cluster_sync_after_some_exited, "twice without a wait", 2, 2),
    CASE(released_by_one_thread, "race", 1, 1, 160),
    CASE(one_flag_read_twice, "deadlock.*a flag", 2),
    CASE(two_flags_polled, "deadlock.*a flag", 2),
    CASE(counted_without_release, "race|uninitialised", 3),
    CASE(counted_before_barrier, "race|uninitialised", 3),
    CASE(four_floats_off_their_boundary, "ld.global.v4 off its 16-byte boundary"),
    CASE(two_floats_off_their_boundary, "st.global.v2 off its 8-byte boundary"),
    CASE(relay_without_writers_fence, "missing proxy fence", 2),
    CASE(relay_without_readers_fence, "missing proxy fence", 2),
    CASE(cp_async_into_wgmma, "missing proxy fence"),
    CASE(cp_async_source_overwritten, "race"),
    CASE(cp_async_not_committed, "did not commit"),
    CASE(fence_of_the_other_space, "missing proxy fence"),
    CASE(fence_by_one_lane, "missing proxy fence"),
    CASE(clipped_store, "uninitialised"),
    CASE(waited_for_by_another_lane, "exits with bulk stores"),
    CASE(accumulators_kept, "wgmma.fence"),
    CASE(fence_before_the_fragment, "wgmma.fence"),
    CASE(three_warps_of_four, "deadlock.*its warpgroup"),
    CASE(transposition_differs, "different instructions"),
    CASE(registers_of_one_warp, "not all warps", 1, 1, 384),
    CASE(word_waited_for_in_block_scope, "race", 2, 2),
    CASE(word_of_eight_bytes, "deadlock", 2, 2),
    CASE(word_overwritten_before_it_was_read, "race", 2, 2),
    CASE(read_in_another_block_early, "race|uninitialised", 8, 4),
    CASE(left_while_another_block_reads, "exited", 8, 4),
    CASE(written_by_the_elected_lane, "race|uninitialised"),
    CASE(elected_lane_runs_into_a_barrier, "elected lane"),
    CASE(barrier_of_two_sizes, "was one of 128"),
    CASE(dependent_does_not_wait, "without waiting for the kernel before", 1, 1, 128, true),
};
#undef CASE

}  // namespace

std::vector<std::pair<std::string, std::string>> misuse_cases() {
  std::vector<std::pair<std::string, std::string>> found;
  for (const Case& c : kCases) found.emplace_back(c.name, c.report);
  return found;
}

void run_misuse(const std::string& name, bool wrong, Options options) {
  for (const Case& c : kCases) {
    if (name != c.name) continue;
    for (int i = 0; i < 64 * 64; ++i) memory.in[i] = 0x3f80;
    std::fill(std::begin(memory.flags), std::end(memory.flags), 0);
    global.clear();
    global.add("in", memory.in, sizeof(memory.in), Use::input);
    global.add("out", memory.out, sizeof(memory.out), Use::output);
    global.add("flags", memory.flags, sizeof(memory.flags), Use::workspace);
    Launch l;
    l.name = c.name;
    l.body = [&] { c.kernel(wrong); };
    l.grid_x = c.blocks;
    l.cluster = c.cluster;
    l.threads = c.threads;
    l.shared_bytes = 2 * kTile + 1024 + 64;
    std::vector<Launch> launches{l};
    if (c.dependent) {
      launches.insert(launches.begin(), l);
      launches[0].body = write_first_kernel;
      launches[1].after = 0;
      launches[1].programmatic = true;
    }
    if (c.blocks == 4) options.resident_blocks = 2;
    Machine machine;
    machine.run(launches, options);
    return;
  }
  throw Error("there is no kernel " + name);
}

}  // namespace emu
