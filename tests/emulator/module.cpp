// The emulated kernels on numpy arrays.
#include "module.h"

#include <cstring>
#include <memory>

#include "calls.h"
#include "instructions.h"
#include "misuse.h"

namespace {

// Of each tile, by its name in a demangled kernel.
std::map<std::string, int> shared_bytes() {
  std::map<std::string, int> found;
#define LK_TILE(...) \
  found["DownProjSm80Tile<" #__VA_ARGS__ ">"] = DownProjSm80Tile<__VA_ARGS__>::kSharedBytes;
  LK_DOWN_PROJ_SM80_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["DownProjSm90Tile<" #__VA_ARGS__ ">"] = DownProjSm90Tile<__VA_ARGS__>::kSharedBytes;
  LK_DOWN_PROJ_SM90_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["FusedGemmSm90Tile<" #__VA_ARGS__ ">"] = FusedGemmSm90Tile<__VA_ARGS__>::kSharedBytes;
  LK_FUSED_GEMM_SM90_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["FusedGemmSm80Tile<" #__VA_ARGS__ ">"] = FusedGemmSm80Tile<__VA_ARGS__>::kSharedBytes;
  LK_FUSED_GEMM_SM80_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["WeightGradSm90Tile<" #__VA_ARGS__ ">"] = WeightGradSm90Tile<__VA_ARGS__>::kSharedBytes;
  LK_WEIGHT_GRAD_SM90_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) \
  found["WeightGradSm80Tile<" #__VA_ARGS__ ">"] = WeightGradSm80Tile<__VA_ARGS__>::kSharedBytes;
  LK_WEIGHT_GRAD_SM80_TILES(LK_TILE)
#undef LK_TILE
#define LK_TILE(...) found["DecodeTile<" #__VA_ARGS__ ">"] = DecodeTile<__VA_ARGS__>::kSharedBytes;
  LK_DECODE_TILES(LK_TILE)
#undef LK_TILE
  return found;
}

py::dict plan(const Array& x, const Array& down, const Array& h, const std::vector<int64_t>& seed,
              int compute, int multiprocessors, bool sm90a) {
  const DownProjArgs args = down_proj_args(x, down, h, true, seed, 0, 1.0f);
  const DownProjPlan p = plan_down_proj(args, {compute, multiprocessors, sm90a});
  py::dict found;
  const char* names[] = {"none", "sm80", "sm90"};
  found["kernel"] = names[static_cast<int>(p.kernel)];
  found["rank"] = p.rank;
  found["rows"] = p.rows;
  found["depth"] = p.depth;
  found["stages"] = p.stages;
  found["threads"] = p.threads;
  found["shared_bytes"] = p.shared_bytes;
  found["blocks"] = p.blocks;
  found["rank_blocks"] = p.rank_blocks;
  found["text"] = describe(p);
  found["mn_major"] = p.layout.mn_major;
  found["vectors"] = py::make_tuple(p.layout.x_vectors, p.layout.down_vectors);
  found["reason"] = p.reason;
  return found;
}

// Writes h, which is poisoned before; raises RuntimeError with the emulator's report.
py::dict down_proj(const Array& x, const Array& down, Array h, bool is_bf16,
                   const std::vector<int64_t>& seed, uint32_t threshold, float scale, int compute,
                   int multiprocessors, uint64_t schedule, const std::string& timing,
                   int resident_blocks) {
  const DownProjArgs args = down_proj_args(x, down, h, is_bf16, seed, threshold, scale);
  emu::global.clear();
  add_buffer("x", x, emu::Use::input);
  add_buffer("down", down, emu::Use::input);
  add_buffer("h", h, emu::Use::output);
  return run(emu::down_proj_launches(args, plan_down_proj(args, {compute, multiprocessors, true})),
             options_of(schedule, timing, resident_blocks));
}

// Projections of one x, by one launch; a `down` and an h for each, seeds and scales likewise.
py::dict down_proj_group(const Array& x, const std::vector<Array>& down,
                         const std::vector<Array>& h, const py::dict& given) {
  const Scalars s = scalars_of(given);
  const auto seeds = given["seeds"].cast<std::vector<std::vector<int64_t>>>();
  const auto scales = given["scales"].cast<std::vector<float>>();
  emu::global.clear();
  add_buffer("x", x, emu::Use::input);
  std::vector<DownProjArgs> each;
  for (size_t i = 0; i < down.size(); ++i) {
    add_buffer("down", down[i], emu::Use::input);
    add_buffer("h", h[i], emu::Use::output);
    each.push_back(
        down_proj_args(x, down[i], h[i], s.is_bf16, seeds.at(i), s.threshold, scales.at(i)));
  }
  const auto count = static_cast<int>(each.size());
  const DownProjGroupPlan plan = plan_down_proj_group(each.data(), count, s.target);
  if (!plan.served) throw py::value_error(plan.reason);
  py::dict found = run(emu::down_proj_group_launches(each.data(), count, plan), s.options);
  found["rank"] = plan.tile.rank;
  found["blocks"] = plan.tile.blocks;
  found["parts"] = plan.tile.rank_blocks;
  found["text"] = describe(plan);
  return found;
}

// ---- fused_gemm and forward ---------------------------------------------------------------------

ForwardRequest request_of(const Scalars& s) {
  ForwardRequest request;
  if (!form_of(s.form, &request.form))
    throw py::value_error("form is one_launch, two_launches, decode or empty");
  request.gemm = s.request;
  request.chain = s.chain;
  request.decode = s.decode;
  return request;
}

py::dict described(const DecodePlan& p) {
  py::dict found;
  found["m"] = p.m;
  found["rows"] = p.rows;
  found["tile_n"] = p.work.tile_n;
  found["splits"] = p.work.splits;
  found["stages"] = p.work.stages;
  found["vectors"] = py::make_tuple(p.work.x_vectors, p.work.up_vectors);
  found["shared_bytes"] = p.shared_bytes;
  found["loaded_bytes"] = p.loaded_bytes;
  found["seconds"] = p.seconds;
  found["floor_seconds"] = p.floor_seconds;
  return found;
}

py::dict described(const ForwardPlan& p) {
  py::dict found;
  found["served"] = p.served;
  found["form"] = name_of(p.form);
  found["rank"] = p.rank;
  found["tile_n"] = p.gemm.tile_n;
  found["stages"] = p.gemm.stages;
  found["shared_bytes"] = p.gemm.shared_bytes;
  found["mn_major"] = p.gemm.mn_major;
  found["y_vectors"] = p.gemm.y_vectors;
  found["clusters"] = p.form == ForwardForm::one_launch ? p.clusters : p.gemm.clusters;
  const bool decodes = p.form == ForwardForm::decode;
  found["tiles"] = decodes ? p.decode.tiles : p.gemm.empty || !p.served ? 0 : p.gemm.raster.items();
  if (decodes) found["decode"] = described(p.decode);
  found["group"] = p.gemm.raster.group;
  found["chain"] = p.raster.chain;
  found["chains_first"] = p.raster.chains_first;
  found["workspace_bytes"] = p.workspace_bytes;
  found["overhead"] = p.overhead;
  found["reason"] = p.reason;
  found["text"] = describe(p);
  return found;
}

py::dict forward_plan(const Array& x, const Array& weight, const Array& a, const Array& b,
                      const std::optional<Array>& bias, const Array& y, const Array& h,
                      const py::dict& given) {
  const Scalars s = scalars_of(given);
  return described(
      plan_forward(forward_args(x, weight, a, b, bias, y, h, s), s.target, request_of(s)));
}

// Several calls at once, each with a y and an h of its own.
py::dict forward(const Array& x, const Array& weight, const Array& a, const Array& b,
                 const std::optional<Array>& bias, const std::vector<Array>& y,
                 const std::vector<Array>& h, const py::dict& given) {
  const Scalars s = scalars_of(given);
  emu::global.clear();
  add_inputs({{"x", x}, {"weight", weight}, {"A", a}, {"B", b}}, bias);
  std::vector<emu::Launch> launches;
  std::vector<std::unique_ptr<Workspace>> workspaces;
  ForwardPlan plan{};
  for (size_t i = 0; i < y.size(); ++i) {
    add_buffer("y", y[i], emu::Use::output);
    add_buffer("h", h[i], emu::Use::output);
    const ForwardArgs args = forward_args(x, weight, a, b, bias, y[i], h[i], s);
    plan = plan_forward(args, s.target, request_of(s));
    if (!plan.served) throw py::value_error(plan.reason);
    workspaces.push_back(
        std::make_unique<Workspace>(plan.workspace_bytes, plan.sync_offset, 4 * plan.sync_words));
    emu::add_forward(args, plan, s.target, workspaces.back()->begin, launches);
  }
  py::dict found = run(launches, s.options);
  for (const auto& item : described(plan)) found[item.first] = item.second;
  return found;
}

// The names of what a call launches, until number `fails` fails.
std::vector<std::string> launches(const Array& x, const Array& weight, const Array& a,
                                  const Array& b, const std::optional<Array>& bias, const Array& y,
                                  const Array& h, const py::dict& given) {
  const Scalars s = scalars_of(given);
  const ForwardArgs args = forward_args(x, weight, a, b, bias, y, h, s);
  const ForwardPlan plan = plan_forward(args, s.target, request_of(s));
  const Workspace workspace(plan.workspace_bytes, plan.sync_offset, 4 * plan.sync_words);
  std::vector<emu::Launch> made;
  emu::add_forward(args, plan, s.target, workspace.begin, made, given["fails"].cast<int>());
  std::vector<std::string> names;
  for (const emu::Launch& l : made) names.push_back(l.name);
  return names;
}

py::dict fused_gemm(const Array& x, const Array& weight, const Array& h, const Array& up,
                    const std::optional<Array>& bias, const Array& y, const py::dict& given) {
  const Scalars s = scalars_of(given);
  emu::global.clear();
  add_inputs({{"x", x}, {"weight", weight}, {"h", h}, {"up", up}}, bias);
  add_buffer("y", y, emu::Use::output);
  FusedGemmArgs args = fused_gemm_args(x, weight, h, up, bias, y, s);
  args.dropout = dropout_of(s);
  FusedGemmPlan plan = plan_fused_gemm(args, s.target, s.request);
  if (!plan.served) throw py::value_error(plan.reason);
  Workspace workspace(place_packed(plan), 0, 0);
  std::vector<emu::Launch> launches;
  emu::add_fused_gemm(args, plan, s.target, workspace.begin, launches);
  py::dict found = run(launches, s.options);
  found["text"] = describe(plan);
  found["mn_major"] = plan.mn_major;
  found["tile_n"] = plan.tile_n;
  return found;
}

// (is h, pair, column, count) of each item.
std::vector<std::tuple<bool, uint32_t, uint32_t, uint32_t>> raster(uint32_t pairs, uint32_t columns,
                                                                   uint32_t group, uint32_t chain,
                                                                   bool chains_first) {
  const Raster r{pairs, columns, group, chain, chains_first};
  std::vector<std::tuple<bool, uint32_t, uint32_t, uint32_t>> places;
  for (uint32_t item = 0; item < r.items(); ++item) {
    const RasterPlace at = r.place(item);
    places.push_back({at.is_h, at.pair, at.column, at.count});
  }
  return places;
}

py::dict gemm_probe(const Array& a, const Array& b, Array c, int tile_n, bool trans_a, bool trans_b,
                    int clusters, uint64_t schedule, const std::string& timing,
                    int resident_blocks) {
  emu::global.clear();
  add_buffer("a", a, emu::Use::input);
  add_buffer("b", b, emu::Use::input);
  add_buffer("c", c, emu::Use::output);
  const auto K = static_cast<int>(a.shape(trans_a ? 0 : 1));
  return run(
      {emu::gemm_probe_launch(a.data(), b.data(), c.mutable_data(), static_cast<int>(c.shape(0)),
                              static_cast<int>(c.shape(1)), K, tile_n, trans_a, trans_b, clusters)},
      options_of(schedule, timing, resident_blocks));
}

// `grids` of them at once, each with its own h, out, ticket and flags.
py::dict relay_probe(const Array& in, std::vector<Array> h, std::vector<Array> out, int blocks,
                     uint64_t schedule, const std::string& timing, int resident_blocks) {
  emu::global.clear();
  add_buffer("in", in, emu::Use::input);
  const int tiles = static_cast<int>(in.shape(0) / 64);
  std::vector<std::vector<uint32_t>> words(h.size(), std::vector<uint32_t>(1 + tiles));
  std::vector<emu::Launch> launches;
  for (size_t i = 0; i < h.size(); ++i) {
    add_buffer("h", h[i], emu::Use::output);
    add_buffer("out", out[i], emu::Use::output);
    emu::global.add("flags", words[i].data(), words[i].size() * 4, emu::Use::workspace);
    launches.push_back(emu::relay_probe_launch(in.data(), h[i].mutable_data(),
                                               out[i].mutable_data(), words[i].data(),
                                               words[i].data() + 1, tiles, blocks));
  }
  return run(launches, options_of(schedule, timing, resident_blocks));
}

emu::OperandSpec operand_of(const py::dict& o) {
  const auto data = o["data"].cast<Array>();
  const auto box = o["box"].cast<std::array<int, 2>>();
  return {data.data(),
          data.shape(0),
          data.shape(1),
          box[0],
          box[1],
          o["copies"].cast<std::vector<std::array<int, 3>>>(),
          o["descriptor"].cast<uint64_t>(),
          o["starts"].cast<std::vector<uint32_t>>(),
          o["transposed"].cast<bool>()};
}

std::vector<float> wgmma(const py::dict& a, const py::dict& b, int n, bool is_bf16,
                         const std::vector<uint32_t>& a_registers, const std::string& timing) {
  return emu::run_wgmma(operand_of(a), operand_of(b), n, is_bf16, a_registers,
                        options_of(0, timing, 1 << 20));
}

void misuse(const std::string& name, bool wrong, uint64_t schedule, const std::string& timing) {
  emu::run_misuse(name, wrong, options_of(schedule, timing, 1 << 20));
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  py::register_exception<emu::Error>(m, "EmulatorError", PyExc_RuntimeError);
  m.def("misuse_cases", &emu::misuse_cases);
  m.def("misuse", &misuse, py::arg("name"), py::arg("wrong"), py::arg("schedule") = 0,
        py::arg("timing") = "random");
  m.def("down_proj_group", &down_proj_group);
  m.def("forward_plan", &forward_plan);
  m.def("forward", &forward);
  m.def("launches", &launches);
  m.def("fused_gemm", &fused_gemm);
  define_backward(m);
  define_group(m);
  m.def("raster", &raster);
  m.def("gemm_probe", &gemm_probe);
  m.def("relay_probe", &relay_probe);
  m.def("wgmma", &wgmma);
  m.def("ldmatrix", &emu::run_ldmatrix);
  m.def("stmatrix", &emu::run_stmatrix);
  m.def("mma", &emu::run_mma);
  m.def("movmatrix", &emu::run_movmatrix);
  m.def("descriptors", [](uint32_t panel_bytes) {
    return py::make_tuple(k_major_descriptor(0), mn_major_descriptor(0, panel_bytes), kKMajorStep,
                          kMnMajorStep);
  });
  m.def("shared_bytes", &shared_bytes);
  m.def("plan", &plan, py::arg("x"), py::arg("down"), py::arg("h"), py::arg("seed"),
        py::arg("compute"), py::arg("multiprocessors"), py::arg("sm90a") = true);
  m.def("down_proj", &down_proj, py::arg("x"), py::arg("down"), py::arg("h"), py::arg("is_bf16"),
        py::arg("seed"), py::arg("threshold"), py::arg("scale"), py::arg("compute"),
        py::arg("multiprocessors"), py::arg("schedule") = 0, py::arg("timing") = "random",
        py::arg("resident_blocks") = 1 << 20);
}
