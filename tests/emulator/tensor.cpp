#include "tensor.h"

#include <algorithm>
#include <limits>

namespace emu {

namespace {

uint16_t half_of(uint32_t word, int half) { return static_cast<uint16_t>(word >> (16 * half)); }

float number(uint16_t bits, bool is_bf16) {
  return is_bf16 ? to_float(Bf16{bits}) : to_float(F16{bits});
}

// Counts the extra passes of 8 rows of 16 bytes through the 32 banks.
void count_conflicts(const uint32_t (&rows)[8]) {
  int uses[8] = {}, most = 0;
  for (uint32_t row : rows) most = std::max(most, ++uses[row / 16 % 8]);
  machine->statistics.bank_conflicts += static_cast<unsigned>(most - 1);
}

struct Matrices {
  uint32_t address;
  uint32_t* r;
};

}  // namespace

// ---- ldmatrix, stmatrix, mma.sync ---------------------------------------------------------------

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, Place at) {
  if (address % 16) machine->fail("misaligned: ldmatrix", at);
  Matrices mine{address, r};
  machine->collective("ldmatrix", at, &mine, [&](auto& lanes) {
    warp().wgmma_fenced = false;  // registers that a wgmma may take are new
    for (int m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) {
        rows[i] = lanes[8 * m + i]->address;
        block().shared->read(rows[i], matrix[i], 16, generic_access("ldmatrix", at));
      }
      count_conflicts(rows);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[j][i] : matrix[i][j];
        const uint32_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
        lanes[lane]->r[m] = low | high << 16;
      }
    }
  });
}

void store_matrices(uint32_t address, const uint32_t (&r)[4], Place at) {
  if (address % 16) machine->fail("misaligned: stmatrix", at);
  Matrices mine{address, const_cast<uint32_t*>(r)};
  machine->collective("stmatrix", at, &mine, [&](auto& lanes) {
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) {
        uint32_t row[4];
        for (int j = 0; j < 4; ++j) row[j] = lanes[4 * i + j]->r[m];
        rows[i] = lanes[8 * m + i]->address;
        block().shared->write(rows[i], row, 16, generic_access("stmatrix", at));
      }
      count_conflicts(rows);
    }
  });
}

uint32_t turn_matrix(uint32_t matrix, Place at) {
  uint32_t mine = matrix;
  machine->collective("movmatrix", at, &mine, [](auto& lanes) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        rows[lane / 4][lane % 4 * 2 + half] = half_of(*lanes[lane], half);
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane / 4, row = lane % 4 * 2;
      *lanes[lane] = rows[row][column] | static_cast<uint32_t>(rows[row + 1][column]) << 16;
    }
  });
  return mine;
}

void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16,
              Place at) {
  struct Mine {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  machine->collective("mma.sync", at, &mine, [&](auto& lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int v = 0; v < 4; ++v)  // rows g, g + 8; columns 2t, 2t + 1 and 8 further
          left[g + v % 2 * 8][2 * t + half + v / 2 * 8] =
              number(half_of(lanes[lane]->a[v], half), is_bf16);
        for (int v = 0; v < 2; ++v)
          right[2 * t + half + v * 8][g] = number(half_of(lanes[lane]->b[v], half), is_bf16);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int i = lane / 4 + e / 2 * 8, j = lane % 4 * 2 + e % 2;
        float sum = lanes[lane]->d[e];
        for (int k = 0; k < 16; ++k) sum += left[i][k] * right[k][j];
        lanes[lane]->d[e] = sum;
      }
  });
}

// Which lane the hardware takes is its own affair, but it stays the same one.
bool elect(Place at) {
  struct {
  } none;
  machine->collective("elect.sync", at, &none, [](auto&) {});
  self().alone = self().lane == static_cast<int>(warp().agent / kAgentsOfWarp % 32);
  return self().alone;
}

uint32_t shuffle_from_0(uint32_t value, Place at) {
  uint32_t mine = value;
  machine->collective("shfl", at, &mine, [](auto& lanes) {
    const uint32_t first = *lanes[0];
    for (uint32_t* lane : lanes) *lane = first;
  });
  return mine;
}

void sync_warp(Place at) {
  struct {
  } none;
  machine->collective("bar.warp.sync", at, &none, [](auto&) {});
  self().alone = false;
}

// ---- wgmma --------------------------------------------------------------------------------------

namespace {

struct Operand {
  uint32_t address, leading, stride;
};

Operand decode(uint64_t descriptor, Place at) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    machine->fail("wgmma: only the 128-byte swizzle with base offset 0 is modelled", at);
  auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  return {field(0), field(16), field(32)};
}

// Element (mn, k..) of an operand as the canonical layouts of the PTX ISA define them: 8 x 128-byte
// atoms; K-major: `stride` from one 8 rows of M or N to the next. MN-major: `stride` from one 8
// rows of K to the next, `leading` from 64 elements of M or N to the next.
void fetch(const Operand& o, bool transposed, int rows, int first, bool is_bf16, const Access& a,
           float* to) {
  SharedMemory& shared = *block().shared;
  uint16_t chunk[8];
  if (!transposed) {
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < 2; ++c) {
        const uint32_t mn = static_cast<uint32_t>(first + i);
        const uint32_t at =
            o.address + mn % 8 * 128 + mn / 8 * o.stride + static_cast<uint32_t>(c) * 16;
        shared.read(swizzle_128(at), chunk, 16, a);
        for (int k = 0; k < 8; ++k) to[i * 16 + c * 8 + k] = number(chunk[k], is_bf16);
      }
    return;
  }
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < rows; i += 8) {
      const uint32_t mn = static_cast<uint32_t>(first + i), row = static_cast<uint32_t>(k);
      const uint32_t at =
          o.address + mn % 64 * 2 + mn / 64 * o.leading + row % 8 * 128 + row / 8 * o.stride;
      shared.read(swizzle_128(at), chunk, 16, a);
      for (int e = 0; e < 8; ++e) to[(i + e) * 16 + k] = number(chunk[e], is_bf16);
    }
}

void execute(Warp& w, WgmmaOp& op) {
  if (op.done) return;
  op.done = true;
  // Runs from a wait or from an event; shared memory is that of the issuing warp.
  Thread* before = machine->self;
  if (before == nullptr) machine->self = &w.threads[0];
  const uint32_t tensor = w.block->tensor_agents[w.index / 4];
  const Access access{{tensor, op.group}, op.known.get(), Proxy::async, "wgmma", op.place};
  std::vector<float> a(16 * 16), b(static_cast<size_t>(op.columns) * 16);
  if (op.a_in_registers) {
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 8; ++e) {
        const int row = lane / 4 + e / 2 % 2 * 8, k = lane % 4 * 2 + e % 2 + e / 4 * 8;
        a[row * 16 + k] = number(half_of(op.registers[lane][e / 2], e % 2), op.is_bf16);
      }
  } else {
    fetch(decode(op.a, op.place), op.transposed_a, 16, w.index % 4 * 16, op.is_bf16, access,
          a.data());
  }
  fetch(decode(op.b, op.place), op.transposed_b, op.columns, 0, op.is_bf16, access, b.data());
  op.product.assign(static_cast<size_t>(op.columns) * 16, 0.0f);
  std::vector<float> b_t(b.size());
  for (int n = 0; n < op.columns; ++n)
    for (int k = 0; k < 16; ++k) b_t[k * op.columns + n] = b[n * 16 + k];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) {
      const float left = a[i * 16 + k];
      float* row = &op.product[i * op.columns];
      const float* right = &b_t[k * op.columns];
      for (int n = 0; n < op.columns; ++n) row[n] += left * right[n];
    }
  machine->self = before;
}

// All warps of a warpgroup must issue the same sequence.
void log_signature(Warp& w, uint64_t signature, Place at) {
  auto& log = block().wgmma_log[w.index / 4];
  if (w.wgmma_issued == log.size())
    log.push_back(signature);
  else if (log[w.wgmma_issued] != signature)
    machine->fail("wgmma: the warps of a warpgroup issue different instructions", at);
  ++w.wgmma_issued;
}

Accumulators& taken(Thread& t, float* d, int count) {
  for (Accumulators& a : t.accumulators)
    if (a.registers == d) return a;
  t.accumulators.push_back({d, count, std::vector<float>(d, d + count)});
  std::fill(d, d + count, std::numeric_limits<float>::quiet_NaN());
  return t.accumulators.back();
}

}  // namespace

void fence_wgmma(Place at) {
  struct {
  } none;
  machine->collective("wgmma.fence", at, &none, [](auto&) { warp().wgmma_fenced = true; });
}

void issue_wgmma(float* d, int count, const uint32_t* a, uint64_t a_descriptor, uint64_t b,
                 bool transposed_a, bool transposed_b, bool accumulate, bool is_bf16, Place at) {
  struct Mine {
    float* d;
    const uint32_t* a;
    uint64_t descriptors[2];
    bool accumulate;
  } mine{d, a, {a_descriptor, b}, accumulate};
  taken(self(), d, count);
  machine->collective("wgmma", at, &mine, [&](auto& lanes) {
    Warp& w = warp();
    if (!w.wgmma_fenced)
      machine->fail("missing fence: wgmma without wgmma.fence since the last wait", at);
    auto op = std::make_shared<WgmmaOp>();
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane]->descriptors[0] != a_descriptor || lanes[lane]->descriptors[1] != b ||
          lanes[lane]->accumulate != accumulate)
        machine->fail("wgmma: operands differ between the lanes of a warp", at);
      op->d[lane] = lanes[lane]->d;
      op->registers[lane] = lanes[lane]->a;
    }
    op->a = a_descriptor;
    op->b = b;
    op->a_in_registers = a != nullptr;
    op->transposed_a = transposed_a;
    op->transposed_b = transposed_b;
    op->is_bf16 = is_bf16;
    op->accumulate = accumulate;
    op->columns = 2 * count;
    op->group = w.wgmma_committed + 1;
    op->known = snapshot(w);
    op->place = at;
    const uint64_t form = static_cast<uint64_t>(count) << 5 | (a != nullptr) << 4 | is_bf16 << 3 |
                          transposed_a << 2 | transposed_b << 1 | accumulate;
    log_signature(w, a_descriptor * 31 + b * 7 + form * 1000003, at);
    w.wgmmas.push_back(op);
    Warp* owner = &w;
    if (machine->options().timing != Timing::late)
      machine->post([owner, op] { execute(*owner, *op); });
  });
}

void commit_wgmmas(Place at) {
  struct {
  } none;
  machine->collective("wgmma.commit_group", at, &none, [](auto&) { ++warp().wgmma_committed; });
}

void wait_wgmmas(uint32_t pending, Place at) {
  struct {
  } none;
  Warp& w = warp();
  const uint32_t committed = w.wgmma_committed;
  const uint32_t complete = committed > pending ? committed - pending : 0;
  // A wgmma is one operation of four warps: it is complete for all of them, or for none.
  Warp* first = &w.block->warps[w.index / 4 * 4];
  machine->wait_until("the other warps of its warpgroup", at, [&] {
    return std::all_of(first, first + 4,
                       [&](const Warp& peer) { return peer.wgmma_committed >= complete; });
  });
  machine->collective("wgmma.wait_group", at, &none, [&](auto&) {
    for (Warp* peer = first; peer < first + 4; ++peer)
      for (auto& op : peer->wgmmas)
        if (op->group <= complete) execute(*peer, *op);
    // Every lane's accumulators that no later group owns come back.
    while (!w.wgmmas.empty() && w.wgmmas.front()->group <= complete) {
      const WgmmaOp& op = *w.wgmmas.front();
      for (int lane = 0; lane < 32; ++lane) {
        Accumulators& acc = taken(w.threads[lane], op.d[lane], op.columns / 2);
        for (int i = 0; i < acc.count; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          acc.saved[i] =
              (op.accumulate ? acc.saved[i] : 0.0f) + op.product[row * op.columns + column];
        }
      }
      w.wgmmas.pop_front();
    }
    for (Thread& t : w.threads)
      for (size_t i = 0; i < t.accumulators.size();) {
        Accumulators& acc = t.accumulators[i];
        const bool owned = std::any_of(w.wgmmas.begin(), w.wgmmas.end(), [&](const auto& op) {
          return op->d[t.lane] == acc.registers;
        });
        if (owned) {
          ++i;
          continue;
        }
        std::copy(acc.saved.begin(), acc.saved.end(), acc.registers);
        w.wgmma_fenced = false;
        acc = std::move(t.accumulators.back());
        t.accumulators.pop_back();
      }
    w.known.generic.advance(w.block->tensor_agents[w.index / 4], complete);
  });
}

}  // namespace emu
