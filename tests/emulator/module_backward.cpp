// The backward pass, emulated on numpy arrays.
#include <memory>
#include <tuple>

#include "calls.h"
#include "module.h"

namespace {

BackwardRequest request_of(const Scalars& s) {
  BackwardRequest request;
  if (!form_of(s.form, &request.form)) throw py::value_error("form is one_grid, passes or empty");
  request.gemm = s.request;
  return request;
}

py::dict described(const BackwardPlan& p) {
  const bool one = p.form == BackwardForm::one_grid;
  py::dict found;
  found["form"] = one ? "one_grid" : "passes";
  found["clusters"] = one ? p.grid.clusters : p.gemm.clusters;
  found["served"] = p.served;
  found["reason"] = p.reason;
  found["text"] = describe(p);
  found["workspace_bytes"] = p.workspace_bytes;
  found["overhead"] = p.overhead;
  found["tile_n"] = p.gemm.tile_n;
  found["mn_major"] = p.gemm.mn_major;
  found["rank"] = p.dy_pass.rank;
  found["chunks"] = p.dy_pass.chunks;
  found["splits"] = py::make_tuple(p.dy_pass.splits, p.x_pass.splits);
  return found;
}

py::dict backward_plan(const std::vector<Array>& operands, const py::dict& to,
                       const py::dict& given) {
  const Scalars s = scalars_of(given);
  return described(
      plan_backward(backward_args(operands, results_of(to), s), s.target, request_of(s)));
}

// operands: dy, x, weight, A, B, h. Several calls at once, each with results of its own; a call
// stops where launch number options["fails"] fails.
py::dict backward(const std::vector<Array>& operands, const std::vector<py::dict>& calls,
                  const py::dict& given) {
  const Scalars s = scalars_of(given);
  emu::global.clear();
  const char* names[] = {"dy", "x", "weight", "A", "B", "h"};
  for (size_t i = 0; i < operands.size(); ++i) add_buffer(names[i], operands[i], emu::Use::input);
  std::vector<emu::Launch> launches;
  std::vector<std::unique_ptr<Workspace>> workspaces;
  BackwardPlan plan{};
  for (const py::dict& call : calls) {
    const Results to = results_of(call);
    add_result("dx", to.dx);
    add_result("da", to.da);
    add_result("db", to.db);
    add_result("dbias", to.dbias);
    const BackwardArgs args = backward_args(operands, to, s);
    plan = plan_backward(args, s.target, request_of(s));
    if (!plan.served) throw py::value_error(plan.reason);
    workspaces.push_back(std::make_unique<Workspace>(
        plan.workspace_bytes, plan.grid.sync_offset,
        plan.form == BackwardForm::one_grid ? 4 * plan.grid.sync_words() : 0));
    emu::add_backward(args, plan, s.target, workspaces.back()->begin, launches,
                      given.contains("fails") ? given["fails"].cast<int>() : -1);
  }
  py::dict found;
  if (given.contains("fails")) {
    std::vector<std::string> made;
    for (const emu::Launch& l : launches) made.push_back(l.name);
    found["kernels"] = made;
  } else {
    found = run(launches, s.options);
  }
  for (const auto& item : described(plan)) found[item.first] = item.second;
  return found;
}

// With "sums" in the options, those of columns of x too.
void add_sums(WeightGradPass& pass, const Scalars& s, const py::dict& given) {
  if (!given.contains("sums")) return;
  const Result sums = given["sums"].cast<py::array>();
  add_result("sums", sums);
  pass.with_sums = true;
  pass.sums = result_of(sums, s.is_bf16);
}

py::dict run_pass(const WeightGradPass& pass, const Scalars& s) {
  WeightGradPlan plan = plan_weight_grad(pass, s.target);
  if (!plan.served) throw py::value_error(plan.reason);
  Workspace workspace(place_weight_grad(pass, plan), 0, 0);
  std::vector<emu::Launch> launches;
  emu::add_weight_grad(pass, plan, s.target, workspace.begin, launches);
  py::dict found = run(launches, s.options);
  found["text"] = describe(plan);
  found["cycles"] = plan.cycles;
  return found;
}

// grad [r, K] = scale h^T select(mask, x, 0).
py::dict weight_grad(const Array& h, const Array& x, const py::array& grad, const py::dict& given) {
  const Scalars s = scalars_of(given);
  emu::global.clear();
  add_buffer("h", h, emu::Use::input);
  add_buffer("x", x, emu::Use::input);
  add_result("grad", grad);
  WeightGradPass pass{};
  pass.with_grad = h.shape(1) > 0;
  pass.grad = {matrix_of(h, s.is_bf16),
               matrix_of(x, s.is_bf16),
               result_of(grad, s.is_bf16),
               x.shape(0),
               x.shape(1),
               h.shape(1),
               s.up_scale,
               dropout_of(s)};
  add_sums(pass, s, given);
  return run_pass(pass, s);
}

// The plan of such a call.
py::dict weight_grad_plan(const Array& h, const Array& x, const py::dict& given) {
  const Scalars s = scalars_of(given);
  WeightGradPass pass{};
  pass.with_grad = h.shape(1) > 0;
  pass.with_down = given.contains("down");
  pass.with_sums = given.contains("sums");
  pass.grad = {matrix_of(h, s.is_bf16),
               matrix_of(x, s.is_bf16),
               {},
               x.shape(0),
               x.shape(1),
               h.shape(1),
               s.up_scale,
               dropout_of(s)};
  WeightGradPlan p = plan_weight_grad(pass, s.target);
  py::dict found;
  found["served"] = p.served;
  found["text"] = describe(p);
  found["kernel"] = p.kernel == Kernel::sm90 ? "sm90" : p.kernel == Kernel::sm80 ? "sm80" : "none";
  found["makes_down"] = p.makes_down;
  found["rank"] = p.rank;
  found["rows"] = p.rows;
  found["grid"] = py::make_tuple(p.chunks, p.splits, p.rank_blocks);
  found["shared_bytes"] = p.shared_bytes;
  found["cycles"] = p.cycles;
  found["workspace_bytes"] = p.served ? place_weight_grad(pass, p) : 0;
  return found;
}

// Of parts (first, grad, scale, seed, threshold): grad [ranks, K] = scale h^T select(mask, x, 0),
// with columns [first, first + ranks) of h.
using GivenPart = std::tuple<int64_t, py::array, float, std::vector<int64_t>, uint32_t>;

py::dict weight_grad_group(const Array& h, const Array& x, const std::vector<GivenPart>& parts,
                           const py::dict& given) {
  const Scalars s = scalars_of(given);
  if (parts.size() > kMaxGroup) throw py::value_error("a group has at most five parts");
  emu::global.clear();
  add_buffer("h", h, emu::Use::input);
  add_buffer("x", x, emu::Use::input);
  WeightGradPass pass{};
  pass.with_grad = h.shape(1) > 0;
  pass.grad = {matrix_of(h, s.is_bf16),
               matrix_of(x, s.is_bf16),
               {},
               x.shape(0),
               x.shape(1),
               h.shape(1),
               1.0f,
               {}};
  for (const auto& [first, grad, scale, seed, threshold] : parts) {
    add_result("grad", grad);
    const Dropout dropout{seed.empty() ? nullptr : seed.data(), static_cast<int>(seed.size()),
                          threshold};
    pass.parts[pass.part_count++] = {first, grad.shape(0), result_of(grad, s.is_bf16), scale,
                                     dropout};
  }
  add_sums(pass, s, given);
  return run_pass(pass, s);
}

// (what, pair, column, slice, index) of each item.
std::vector<std::tuple<int, uint32_t, uint32_t, uint32_t, uint32_t>> backward_order(
    uint32_t pairs, uint32_t columns, uint32_t group, bool chains_first, uint32_t sums_b,
    uint32_t slices, uint32_t sums_a) {
  constexpr uint32_t kChain = BackwardOrder::kChunkPairs;
  const Raster raster{pairs, columns, group, kChain, chains_first, group / kChain * slices};
  const BackwardOrder order{raster, sums_b, slices, sums_a};
  std::vector<std::tuple<int, uint32_t, uint32_t, uint32_t, uint32_t>> places;
  for (uint32_t item = 0; item < order.items(); ++item) {
    const BackwardPlace at = order.place(item);
    places.push_back({static_cast<int>(at.what), at.tile.pair, at.tile.column, at.slice, at.index});
  }
  return places;
}

}  // namespace

void define_backward(py::module_& m) {
  m.def("backward_plan", &backward_plan);
  m.def("backward", &backward);
  m.def("weight_grad", &weight_grad);
  m.def("weight_grad_plan", &weight_grad_plan);
  m.def("weight_grad_group", &weight_grad_group);
  m.def("backward_order", &backward_order);
}
