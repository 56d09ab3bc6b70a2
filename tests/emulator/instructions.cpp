#include "instructions.h"

#include <algorithm>

#include "cuda/ptx.cuh"
#include "memory.h"

namespace emu {

using namespace lora_kernels;
using namespace lora_kernels::ptx;

namespace {

constexpr uint32_t kOperandBytes = 64 << 10;  // room for one operand

void load_operand(const OperandSpec& o, const TensorMap& map, uint32_t to, uint32_t barrier) {
  for (const auto& [byte, inner, outer] : o.copies)
    tma_load(to + static_cast<uint32_t>(byte), &map, barrier, inner, outer);
}

uint32_t copied_bytes(const OperandSpec& o) {
  return static_cast<uint32_t>(o.copies.size()) * static_cast<uint32_t>(o.box_inner * o.box_outer) *
         2;
}

uint64_t descriptor_at(const OperandSpec& o, uint32_t tile, size_t step) {
  return o.descriptor + ((tile + o.starts[step]) >> 4);
}

template <class T, int kTransA, int kTransB, int kCount>
void multiply(float (&d)[kCount], const OperandSpec& a, const OperandSpec& b, uint32_t tile,
              const std::vector<uint32_t>& a_registers) {
  std::vector<std::array<uint32_t, 4>> fragments(b.starts.size());
  wgmma_fence();
  for (size_t step = 0; step < b.starts.size(); ++step) {
    const uint64_t right = descriptor_at(b, tile + kOperandBytes, step);
    if (a_registers.empty()) {
      wgmma<T, kTransA, kTransB>(d, descriptor_at(a, tile, step), right, step > 0);
    } else {
      auto* r = reinterpret_cast<uint32_t (*)[4]>(fragments[step].data());
      std::copy_n(&a_registers[(step * 128 + threadIdx.x) * 4], 4, *r);
      wgmma<T, kTransB>(d, *r, right, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
}

template <class T, int kN>
void wgmma_kernel(const OperandSpec& a, const OperandSpec& b, const TensorMap& a_map,
                  const TensorMap& b_map, const std::vector<uint32_t>& a_registers, float* out) {
  const uint32_t tile = shared_base(), barrier = tile + 2 * kOperandBytes;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    const bool loads_a = a_registers.empty();
    barrier_arrive_expect(barrier, (loads_a ? copied_bytes(a) : 0) + copied_bytes(b));
    if (loads_a) load_operand(a, a_map, tile, barrier);
    load_operand(b, b_map, tile + kOperandBytes, barrier);
  }
  block_sync();
  barrier_wait(barrier, 0);
  float d[kN / 2];
  std::fill(d, d + kN / 2, 1e30f);  // the first step does not accumulate
  if (a.transposed && b.transposed)
    multiply<T, 1, 1>(d, a, b, tile, a_registers);
  else if (a.transposed)
    multiply<T, 1, 0>(d, a, b, tile, a_registers);
  else if (b.transposed)
    multiply<T, 0, 1>(d, a, b, tile, a_registers);
  else
    multiply<T, 0, 0>(d, a, b, tile, a_registers);
  std::copy(d, d + kN / 2, out + threadIdx.x * (kN / 2));
}

template <int kN>
void run_kernel(const OperandSpec& a, const OperandSpec& b, bool is_bf16,
                const std::vector<uint32_t>& a_registers, float* out, const Options& options) {
  const auto encode = [](const OperandSpec& o) {
    return make_tensor_map({o.data, o.inner, o.outer, o.inner, o.box_inner, o.box_outer});
  };
  const TensorMap a_map = encode(a), b_map = encode(b);
  Launch l;
  l.name = "wgmma";
  l.shared_bytes = 2 * kOperandBytes + 1024 + 64;
  l.body = [&] {
    is_bf16 ? wgmma_kernel<bf16, kN>(a, b, a_map, b_map, a_registers, out)
            : wgmma_kernel<f16, kN>(a, b, a_map, b_map, a_registers, out);
  };
  Machine machine;
  machine.run({l}, options);
}

// One warp, with the matrices at the start of shared memory, a row 16 bytes.
void run_warp(const std::function<void(uint32_t)>& body) {
  Launch l;
  l.name = "warp";
  l.threads = 32;
  l.shared_bytes = 2048;
  l.body = [&] { body(shared_base()); };
  Machine machine;
  machine.run({l}, {});
}

}  // namespace

std::vector<float> run_wgmma(const OperandSpec& a, const OperandSpec& b, int n, bool is_bf16,
                             const std::vector<uint32_t>& a_registers, Options options) {
  global.clear();
  auto add = [](const char* name, const OperandSpec& o) {
    global.add(name, const_cast<uint16_t*>(o.data), static_cast<uint64_t>(o.outer * o.inner) * 2,
               Use::input);
  };
  if (a_registers.empty()) add("a", a);
  add("b", b);
  std::vector<float> out(static_cast<size_t>(128) * static_cast<size_t>(n) / 2);
  auto run = n == 16    ? run_kernel<16>
             : n == 32  ? run_kernel<32>
             : n == 64  ? run_kernel<64>
             : n == 128 ? run_kernel<128>
             : n == 192 ? run_kernel<192>
                        : run_kernel<256>;
  run(a, b, is_bf16, a_registers, out.data(), options);
  return out;
}

std::vector<uint32_t> run_ldmatrix(const std::vector<uint16_t>& matrices, bool transposed) {
  std::vector<uint32_t> out(128);
  run_warp([&](uint32_t base) {
    uint32_t row[4], r[4];
    std::memcpy(row, &matrices[threadIdx.x * 8], 16);
    store_shared_x4(base + threadIdx.x * 16, row);
    warp_sync();
    transposed ? load_matrix_x4_transposed(r, base + threadIdx.x * 16)
               : load_matrix_x4(r, base + threadIdx.x * 16);
    std::copy(r, r + 4, &out[threadIdx.x * 4]);
  });
  return out;
}

std::vector<uint16_t> run_stmatrix(const std::vector<uint32_t>& registers) {
  std::vector<uint16_t> out(256);
  run_warp([&](uint32_t base) {
    uint32_t r[4];
    std::copy_n(&registers[threadIdx.x * 4], 4, r);
    store_matrix_x4(base + threadIdx.x * 16, r);
    warp_sync();
    for (int i = 0; i < 4; ++i) {
      const float pair = load_shared(base + threadIdx.x * 16 + static_cast<uint32_t>(i) * 4);
      std::memcpy(&out[threadIdx.x * 8 + static_cast<unsigned>(i) * 2], &pair, 4);
    }
  });
  return out;
}

std::vector<uint32_t> run_movmatrix(const std::vector<uint32_t>& registers) {
  std::vector<uint32_t> out(32);
  run_warp([&](uint32_t) { out[threadIdx.x] = transpose_matrix(registers[threadIdx.x]); });
  return out;
}

std::vector<float> run_mma(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b,
                           bool is_bf16) {
  std::vector<float> out(128);
  run_warp([&](uint32_t) {
    float d[4] = {};
    uint32_t left[4];
    std::copy_n(&a[threadIdx.x * 4], 4, left);
    const uint32_t* right = &b[threadIdx.x * 2];
    if (is_bf16)
      mma_m16n8k16(d, left, right[0], right[1], bf16{});
    else
      mma_m16n8k16(d, left, right[0], right[1], f16{});
    std::copy(d, d + 4, &out[threadIdx.x * 4]);
  });
  return out;
}

}  // namespace emu
