// The rules without their types: what a plan needs to know of each, as data and function pointers.
// Generated from FUSEDOPT_FOR_EACH_RULE.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/table.h"

namespace fusedopt {

constexpr int kMaxHyper = 8;

// The hyperparameters of a param group, in the order of the rule's kHyperNames.
struct HyperValues {
  double values[kMaxHyper] = {};
};

struct RuleInfo {
  const char* name;
  int index;  // position in the registry, the rule argument of FindKernel
  ScalarStates scalar_states;
  int variants;
  std::vector<HyperName> hyper_names;
  int (*variant)(const HyperValues& hyper);
  bool (*keeps_scalar_states)(const HyperValues& hyper);
  StateNames (*states)(int variant);
  // The size of a Slot, and writing one, for the compute type of a storage type. Writing advances
  // the kMaxScalarStates scalar states it is given.
  int64_t (*slot_size)(DType param);
  void (*write_slot)(DType param, const HyperValues& hyper, double* scalar_states,
                     double grad_factor, std::byte* slot);
};

const std::vector<RuleInfo>& all_rules();

// Throws std::invalid_argument naming the rules there are.
const RuleInfo& find_rule(const std::string& name);

}  // namespace fusedopt
