#include "core/registry.h"

#include <cstring>
#include <stdexcept>

#include "rules/all.h"

namespace fusedopt {

namespace {

template <class Rule>
struct Erased {
  using Hyper = typename Rule::Hyper;
  static constexpr int kCount = sizeof(Rule::kHyperNames) / sizeof(HyperName);
  static_assert(sizeof(Hyper) == kCount * sizeof(double), "one double a hyperparameter name");
  static_assert(kCount <= kMaxHyper);

  static Hyper hyper_of(const HyperValues& from) {
    Hyper hyper;
    std::memcpy(&hyper, from.values, sizeof hyper);
    return hyper;
  }
  static int variant(const HyperValues& hyper) { return Rule::variant(hyper_of(hyper)); }
  static bool keeps_scalar_states(const HyperValues& hyper) {
    if constexpr (requires { Rule::keeps_scalar_states(hyper_of(hyper)); }) {
      return Rule::keeps_scalar_states(hyper_of(hyper));
    } else {
      return Rule::kScalarStates.count > 0;
    }
  }
  static StateNames states(int variant) { return Rule::states(variant); }

  template <class T>
  using SlotType = Slot<T, typename Rule::template Scalars<T>>;

  static int64_t slot_size(DType param) {
    return param == DType::kF64 ? sizeof(SlotType<double>) : sizeof(SlotType<float>);
  }
  template <class T>
  static void write(const Hyper& hyper, double* scalar_states, double grad_factor, std::byte* to) {
    const SlotType<T> slot{T(grad_factor), Rule::template prepare<T>(hyper, scalar_states)};
    std::memcpy(to, &slot, sizeof slot);
  }
  static void write_slot(DType param, const HyperValues& hyper, double* scalar_states,
                         double grad_factor, std::byte* to) {
    const auto write_as = param == DType::kF64 ? write<double> : write<float>;
    write_as(hyper_of(hyper), scalar_states, grad_factor, to);
  }

  static RuleInfo info(const char* name, int index) {
    return {name,
            index,
            Rule::kScalarStates,
            Rule::kVariants,
            {Rule::kHyperNames, Rule::kHyperNames + kCount},
            variant,
            keeps_scalar_states,
            states,
            slot_size,
            write_slot};
  }
};

}  // namespace

const std::vector<RuleInfo>& all_rules() {
  static const std::vector<RuleInfo> rules = [] {
    std::vector<RuleInfo> list;
    int index = 0;
#define FUSEDOPT_INFO(name, Rule) list.push_back(Erased<Rule>::info(name, index++));
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_INFO)
#undef FUSEDOPT_INFO
    return list;
  }();
  return rules;
}

const RuleInfo& find_rule(const std::string& name) {
  std::string names;
  for (const RuleInfo& rule : all_rules()) {
    if (name == rule.name) return rule;
    names += (names.empty() ? "" : ", ") + std::string(rule.name);
  }
  throw std::invalid_argument("rule='" + name + "' is not in the registry, which has: " + names);
}

}  // namespace fusedopt
