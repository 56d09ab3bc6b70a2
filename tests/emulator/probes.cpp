#include "probes.cuh"

#include "kernels.h"

namespace emu {
namespace {

using namespace lora_kernels;

template <class T, int kN>
std::function<void()> gemm_body(bool trans_a, bool trans_b, const TensorMap& a, const TensorMap& b,
                                const TensorMap& c, GemmProbeArgs args) {
  if (trans_a && trans_b) return [=] { gemm_probe<GemmProbe<T, kN, 1, 1>>(a, b, c, args); };
  if (trans_a) return [=] { gemm_probe<GemmProbe<T, kN, 1, 0>>(a, b, c, args); };
  if (trans_b) return [=] { gemm_probe<GemmProbe<T, kN, 0, 1>>(a, b, c, args); };
  return [=] { gemm_probe<GemmProbe<T, kN, 0, 0>>(a, b, c, args); };
}

}  // namespace

Launch gemm_probe_launch(const uint16_t* a, const uint16_t* b, uint16_t* c, int M, int N, int K,
                         int tile_n, bool trans_a, bool trans_b, int clusters) {
  const TensorMap a_map =
      make_tensor_map(trans_a ? TensorMap{a, M, K, M, 64, 64} : TensorMap{a, K, M, K, 64, 128});
  const TensorMap b_map = make_tensor_map(trans_b ? TensorMap{b, N, K, N, 64, 64}
                                                  : TensorMap{b, K, N, K, 64, tile_n / 2});
  const TensorMap c_map = make_tensor_map({c, N, M, N, 64, 64});
  const GemmProbeArgs args{M, N, K};
  Launch l;
  l.name = "gemm_probe";
  l.cluster = 2;
  l.grid_x = 2 * static_cast<unsigned>(clusters);
  l.threads = 384;
  if (tile_n == 256) {
    l.body = gemm_body<Bf16, 256>(trans_a, trans_b, a_map, b_map, c_map, args);
    l.shared_bytes = GemmProbe<Bf16, 256, 0, 0>::kSharedBytes;
  } else {
    l.body = gemm_body<Bf16, 128>(trans_a, trans_b, a_map, b_map, c_map, args);
    l.shared_bytes = GemmProbe<Bf16, 128, 0, 0>::kSharedBytes;
  }
  return l;
}

Launch relay_probe_launch(const uint16_t* in, uint16_t* h, uint16_t* out, uint32_t* ticket,
                          uint32_t* flags, int tiles, int blocks) {
  const TensorMap h_map = make_tensor_map({h, 64, 64 * tiles, 64, 64, 64});
  const TensorMap out_map = make_tensor_map({out, 64, 64 * tiles, 64, 64, 64});
  const RelayProbeArgs args{in, h, ticket, flags, tiles};
  Launch l;
  l.name = "relay_probe";
  l.grid_x = static_cast<unsigned>(blocks);
  l.shared_bytes = kRelayTile + 1024 + 64;
  l.body = [=] { relay_probe(h_map, out_map, args); };
  return l;
}

}  // namespace emu
