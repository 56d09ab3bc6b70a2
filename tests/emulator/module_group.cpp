// Projections that share x, emulated on numpy arrays.
#include <memory>

#include "calls.h"
#include "module.h"

namespace {

// What a projection has of its own, in the order of the operands that the module takes.
using Projection = std::vector<Array>;

// {"scale", "masked_scale", "seed", "threshold"} of a projection; all else is the call's.
std::vector<Scalars> scalars_of_each(const std::vector<py::dict>& each, const py::dict& given) {
  std::vector<Scalars> found;
  for (const py::dict& own : each) {
    py::dict all = given.attr("copy")();
    for (const auto& item : own) all[item.first] = item.second;
    found.push_back(scalars_of(all));
  }
  return found;
}

template <class Plan>
py::dict finish(const std::vector<emu::Launch>& launches, const Plan& plan, int count,
                const emu::Options& options, bool fails) {
  py::dict found;
  if (fails) {
    std::vector<std::string> made;
    for (const emu::Launch& l : launches) made.push_back(l.name);
    found["kernels"] = made;
  } else {
    found = run(launches, options);
  }
  found["text"] = describe(plan, count);
  found["workspace_bytes"] = plan.workspace_bytes;
  return found;
}

// Of each projection weight, A, B, and its y and h.
py::dict forward_group(const Array& x, const std::vector<Projection>& projections,
                       const std::vector<std::optional<Array>>& biases,
                       const std::vector<py::dict>& each, const py::dict& given) {
  const std::vector<Scalars> s = scalars_of_each(each, given);
  const auto count = static_cast<int>(projections.size());
  emu::global.clear();
  add_buffer("x", x, emu::Use::input);
  std::vector<ForwardArgs> args;
  for (int i = 0; i < count; ++i) {
    const Projection& p = projections[i];
    add_inputs({{"weight", p[0]}, {"A", p[1]}, {"B", p[2]}}, biases[i]);
    add_buffer("y", p[3], emu::Use::output);
    add_buffer("h", p[4], emu::Use::output);
    args.push_back(forward_args(x, p[0], p[1], p[2], biases[i], p[3], p[4], s[i]));
  }
  const ForwardGroupPlan plan = plan_forward_group(args.data(), count, s[0].target);
  if (!plan.served) throw py::value_error(plan.reason);
  const Workspace workspace(plan.workspace_bytes, 0, 0);
  std::vector<emu::Launch> launches;
  const bool fails = given.contains("fails");
  emu::add_forward_group(args.data(), count, plan, s[0].target, workspace.begin, launches,
                         fails ? given["fails"].cast<int>() : -1);
  py::dict found = finish(launches, plan, count, s[0].options, fails);
  found["joined"] = plan.joined_count;
  return found;
}

// Of each projection dy, weight, A, B, h; results: those of each, and of all "dx" in the first.
py::dict backward_group(const Array& x, const std::vector<Projection>& projections,
                        const std::vector<py::dict>& results, const std::vector<py::dict>& each,
                        const py::dict& given) {
  const std::vector<Scalars> s = scalars_of_each(each, given);
  const auto count = static_cast<int>(projections.size());
  emu::global.clear();
  add_buffer("x", x, emu::Use::input);
  const Result dx = results_of(results[0]).dx;
  add_result("dx", dx);
  std::vector<BackwardArgs> args;
  for (int i = 0; i < count; ++i) {
    const Projection& p = projections[i];
    const char* names[] = {"dy", "weight", "A", "B", "h"};
    for (size_t j = 0; j < p.size(); ++j) add_buffer(names[j], p[j], emu::Use::input);
    Results to = results_of(results[i]);
    to.dx = dx;
    add_result("da", to.da);
    add_result("db", to.db);
    add_result("dbias", to.dbias);
    args.push_back(backward_args({p[0], x, p[1], p[2], p[3], p[4]}, to, s[i]));
  }
  const BackwardGroupPlan plan = plan_backward_group(args.data(), count, s[0].target);
  if (!plan.served) throw py::value_error(plan.reason);
  const Workspace workspace(plan.workspace_bytes, 0, 0);
  std::vector<emu::Launch> launches;
  const bool fails = given.contains("fails");
  emu::add_backward_group(args.data(), count, plan, s[0].target, workspace.begin, launches,
                          fails ? given["fails"].cast<int>() : -1);
  return finish(launches, plan, count, s[0].options, fails);
}

}  // namespace

void define_group(py::module_& m) {
  m.def("forward_group", &forward_group);
  m.def("backward_group", &backward_group);
}
