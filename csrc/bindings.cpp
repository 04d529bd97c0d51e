// The Python module fusedopt._C: the plan, the CPU tiers, the registry, and the ring
// that batches of data lie in.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/utils/lambda_post_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "cpu/tiers.h"
#include "data/ring.h"
#include "plan/arguments.h"
#include "plan/plan.h"
#include "plan/tensors.h"
#include "plan/triton.h"

namespace fusedopt {
namespace {

at::Tensor local_tensor(const py::object& object, const char* argument) {
  return tensor_of(local_of(object.ptr()).tensor, argument);
}

// A number in a tensor, as kernels read it, or of Python's: torch's GradScaler says 0 instead of a
// tensor when it has found no gradient.
at::Tensor amp_tensor(const py::object& object, const char* argument) {
  if (object.is_none()) return {};
  if (PyLong_Check(object.ptr()) || PyFloat_Check(object.ptr())) {
    return at::full({}, object.cast<double>(), at::kFloat);
  }
  const at::Tensor& tensor = tensor_of(object.ptr(), argument);
  check_number(tensor, argument);
  return tensor;
}

StepRequest request_for(Purpose purpose, const py::object& weight, const py::object& grad_scale,
                        const py::object& found_inf, bool follows) {
  if (purpose < Purpose::kUpdate || purpose > Purpose::kFlush) {
    throw py::value_error("purpose=" + std::to_string(int(purpose)) + " is not one of Purpose's");
  }
  StepRequest request;
  request.purpose = purpose;
  request.follows = follows;
  if (THPVariable_Check(weight.ptr())) {
    request.live_weight = tensor_of(weight.ptr(), "weight");
    check_number(request.live_weight, "weight");
  } else if (PyFloat_Check(weight.ptr()) || PyLong_Check(weight.ptr())) {
    request.weight = weight.cast<double>();
  } else {
    throw_unfit("weight", weight.ptr(), "a number or a tensor of one");
  }
  request.amp = {amp_tensor(grad_scale, "grad_scale"), amp_tensor(found_inf, "found_inf")};
  return request;
}

// Whether DistributedDataParallel will add up a parameter's gradient over the ranks: that is what torch
// has such hooks for, which run after those on the parameter.
bool has_reducer(const py::object& param) {
  const auto node =
      torch::autograd::impl::try_get_grad_accumulator(tensor_of(param.ptr(), "param"));
  if (node == nullptr) return false;
  const auto& hooks = node->post_hooks();
  return std::any_of(hooks.begin(), hooks.end(), [](const auto& hook) {
    return dynamic_cast<torch::autograd::utils::LambdaPostHook*>(hook.get()) != nullptr;
  });
}

// The states a param group's flags ask for, in the order of torch's state_dict but for `step`.
std::vector<std::string> state_names(const std::string& rule_name, const py::dict& group) {
  const RuleInfo& rule = find_rule(rule_name);
  const GroupValues values = GroupReader(rule).read(group, LiveTensors::kAll);
  const StateNames names = rule.states(rule.variant(values.hyper));
  return {names.names, names.names + names.count};
}

// The scalar states they ask for: name, initial value, and value beside states from elsewhere.
std::vector<std::tuple<std::string, double, double>> scalar_states(const std::string& rule_name,
                                                                   const py::dict& group) {
  const RuleInfo& rule = find_rule(rule_name);
  const GroupValues values = GroupReader(rule).read(group, LiveTensors::kAll);
  std::vector<std::tuple<std::string, double, double>> kept;
  for (int k = 0; k < rule.scalar_states.count && rule.keeps_scalar_states(values.hyper); ++k) {
    const ScalarState& state = rule.scalar_states.states[k];
    kept.emplace_back(state.name, state.initial, state.loaded);
  }
  return kept;
}

py::dict rules() {
  py::dict result;
  for (const RuleInfo& rule : all_rules()) {
    py::list hyper;
    for (const HyperName& name : rule.hyper_names) hyper.append(name.key);
    py::list states;
    for (int variant = 0; variant < rule.variants; ++variant) {
      const StateNames names = rule.states(variant);
      states.append(std::vector<std::string>(names.names, names.names + names.count));
    }
    py::dict entry;
    entry["hyper"] = hyper;
    entry["states"] = states;
    py::list scalars;
    for (int k = 0; k < rule.scalar_states.count; ++k) {
      scalars.append(rule.scalar_states.states[k].name);
    }
    entry["scalar_states"] = scalars;
    result[rule.name] = entry;
  }
  return result;
}

bool has_kernel(const py::object& param, const py::object& grad, const py::object& state) {
  const auto p = storage_dtype(tensor_of(param.ptr(), "param"));
  const auto g = storage_dtype(tensor_of(grad.ptr(), "grad"));
  const auto s = storage_dtype(tensor_of(state.ptr(), "state"));
  return p && g && s && storage_index({*p, *g, *s}) >= 0;
}

py::capsule capsule_of(device::Launcher* launcher) {
  return py::capsule(launcher, kLauncherCapsule);
}

py::object wrap(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

void bind_memory(py::module_& m) {
  py::class_<StepOptions>(m, "StepOptions")
      .def(py::init<double, bool, bool, double, bool, bool, bool, bool, bool>(), py::kw_only(),
           py::arg("max_norm") = -1.0, py::arg("measures") = false, py::arg("check") = false,
           py::arg("ema_decay") = -1.0, py::arg("zero_grads") = false,
           py::arg("accumulates") = false, py::arg("mean") = true, py::arg("scaled") = false,
           py::arg("shared") = false)
      .def_readonly("measures", &StepOptions::measures)
      .def_readonly("check", &StepOptions::check)
      .def_readonly("accumulates", &StepOptions::accumulates)
      .def_readonly("mean", &StepOptions::mean)
      .def_property_readonly("averages", &StepOptions::averages)
      .def_property_readonly("may_skip", &StepOptions::may_skip);
  py::class_<StepMemory, std::shared_ptr<StepMemory>>(m, "StepMemory")
      .def(py::init<py::object>(), py::arg("reduce"))
      .def_property(
          "options", [](const StepMemory& self) { return self.options; }, &StepMemory::set_options)
      .def_readwrite("reduce", &StepMemory::reduce)
      .def("has_accumulated",
           [](StepMemory& self, py::handle p) { return self.member(p.ptr()).has_accumulated; })
      .def("remember",
           [](StepMemory& self, py::handle p) { self.member(p.ptr()).has_accumulated = true; })
      .def("forget", &StepMemory::forget)
      .def("end_window", &StepMemory::end_window)
      .def_property("window_weight", &StepMemory::window_weight, &StepMemory::set_window_weight)
      // A decision's memory, by device; csrc/core/decision.h says what is in it.
      .def_property_readonly("decisions", [](const StepMemory& self) {
        py::list tensors;
        for (const auto& [device, tensor] : self.decisions()) tensors.append(wrap(tensor));
        return tensors;
      });
}

// An argument of class StepRequest would take longer to find out that it is None than a small step does.
const StepRequest& request_or(const py::object& request, const StepRequest& otherwise) {
  return request.is_none() ? otherwise : request.cast<const StepRequest&>();
}

void bind_plan(py::module_& m) {
  py::enum_<Purpose>(m, "Purpose")
      .value("UPDATE", Purpose::kUpdate)
      .value("ACCUMULATE", Purpose::kAccumulate)
      .value("CLOSE", Purpose::kClose)
      .value("FLUSH", Purpose::kFlush);
  py::class_<StepRequest>(m, "StepRequest")
      .def(py::init(&request_for), py::arg("purpose") = Purpose::kUpdate, py::arg("weight") = 1.0,
           py::arg("grad_scale") = py::none(), py::arg("found_inf") = py::none(),
           py::arg("follows") = false)
      .def_readonly("purpose", &StepRequest::purpose)
      .def_readwrite("rows", &StepRequest::rows)
      .def_readwrite("before", &StepRequest::before);
  const static StepRequest nothing;
  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init<const std::string&, const py::list&, const py::dict&, const PlacedParams&,
                    std::vector<py::object>, const Launchers&, std::shared_ptr<CapturedTables>,
                    std::shared_ptr<StepMemory>, bool>(),
           py::arg("rule"), py::arg("param_groups"), py::arg("state"), py::arg("rows"),
           py::arg("idle"), py::arg("launchers"), py::arg("captured").none(false),
           py::arg("memory"), py::arg("new_states"))
      .def(
          "why_not",
          [](StepPlan& plan, const py::list& groups, const py::dict& state,
             const py::object& request) {
            return plan.why_not(groups, state, request_or(request, nothing));
          },
          py::arg("param_groups"), py::arg("state"), py::arg("request") = py::none())
      .def(
          "step",
          [](StepPlan& plan, const py::list& groups, const py::dict& state,
             const py::object& request) {
            return plan.step(groups, state, request_or(request, nothing));
          },
          py::arg("param_groups"), py::arg("state"), py::arg("request") = py::none())
      .def("describe", &StepPlan::describe);

  // What `step` says of a flush that meets a gradient which is in no accumulator.
  m.attr("UNSEEN_GRADIENT") = kUnseenGradient;
  // What it says under a TorchDispatchMode.
  m.attr("INTERCEPTED") = kIntercepted;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::class_<CapturedTables, std::shared_ptr<CapturedTables>>(m, "CapturedTables")
      .def(py::init<>())
      .def("refresh", &CapturedTables::refresh, py::arg("rule"), py::arg("param_groups"));
  bind_memory(m);
  bind_plan(m);

  bind_data(m);

  m.def("rules", &rules);
  m.def("has_reducer", &has_reducer, py::arg("param"));
  m.def("state_names", &state_names, py::arg("rule"), py::arg("group"));
  m.def("scalar_states", &scalar_states, py::arg("rule"), py::arg("group"));
  m.def(
      "why_not_fused",
      [](const py::object& param, const py::object& grad) {
        const std::string reason = why_not_local(param.ptr(), grad.ptr());
        if (!reason.empty()) return reason;
        return why_not_fused(local_tensor(param, "param"),
                             grad.is_none() ? at::Tensor() : local_tensor(grad, "grad"));
      },
      py::arg("param"), py::arg("grad"));
  m.def(
      "why_state_unfit",
      [](const py::object& param, const py::object& state) {
        if (!same_placement(local_of(param.ptr()).spec, local_of(state.ptr()).spec)) {
          return std::string("a state is distributed over the ranks in another way");
        }
        if (tensor_of(param.ptr(), "param").sizes() != tensor_of(state.ptr(), "state").sizes()) {
          return std::string("a state has another shape");
        }
        return why_state_unfit(local_tensor(param, "param"), local_tensor(state, "state"));
      },
      py::arg("param"), py::arg("state"));
  m.def("has_kernel", &has_kernel, py::arg("param"), py::arg("grad"), py::arg("state"));
  m.def(
      "overlapping",
      [](const py::list& rows) {
        std::vector<std::vector<at::Tensor>> tensors;
        for (const py::handle row : rows) {
          std::vector<at::Tensor>& arrays = tensors.emplace_back();
          for (const py::handle tensor : row) {
            arrays.push_back(tensor_of(local_of(tensor.ptr()).tensor, "a member of rows"));
          }
        }
        return overlapping_rows(tensors);
      },
      py::arg("rows"));

  // The CUDA kernels' launcher, None in a build without them.
  m.def("cuda_launcher", []() -> py::object {
#if defined(FUSEDOPT_WITH_CUDA)
    return capsule_of(&device::cuda_launcher());
#else
    return py::none();
#endif
  });

  // A launcher of Triton's kernels, which are called through an object's methods. Never destroyed:
  // graphs that it took part in may outlive the interpreter's objects.
  m.def(
      "triton_launcher",
      [](py::object kernels) { return capsule_of(new TritonLauncher(std::move(kernels))); },
      py::arg("kernels"));
  m.def("layout", &layout);
  m.def("gpu_runtime", &device::gpu_runtime);

  // Whether a profiler or observer would see a range recorded now.
  m.def("profiled",
        [] { return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value(); });
  m.def("built_tiers", [] {
    std::vector<std::string> names;
    for (const Tier& tier : built_tiers()) names.emplace_back(tier.name);
    return names;
  });
  m.def("available_tiers", &available_tiers);
  m.def("current_tier", [] { return std::string(current_tier().name); });
  m.def("select_tier", &select_tier, py::arg("name"));
}

}  // namespace fusedopt
