// From places in the registry, known at run time, to types. The only code that searches its lists.
//
// A visitor is a lambda whose argument names the types; what it returns is what the call returns:
//
//   return visit_storage(index, []<class P, class G, class S>(Types<P, G, S>) -> Kernel {
//     return run<P, G, S>;
//   });
//
// Places come from RuleInfo and `storage_index`; any other is a fault of the caller.
#pragma once

#include "core/dtype.h"
#include "rules/all.h"

namespace fusedopt {

template <class... T>
struct Types {};
template <class Rule, int kVariant>
struct Variant {};

template <class Rule, int kVariant = 0, class Visitor>
inline auto visit_variant(int variant, const Visitor& visitor) {
  if constexpr (kVariant + 1 < Rule::kVariants) {
    if (variant != kVariant) return visit_variant<Rule, kVariant + 1>(variant, visitor);
  }
  return visitor(Variant<Rule, kVariant>{});
}

template <class Visitor>
inline auto visit_rule(int rule, int variant, const Visitor& visitor) {
#define FUSEDOPT_VISIT(name, Rule) \
  if (rule-- == 0) return visit_variant<Rule>(variant, visitor);
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_VISIT)
#undef FUSEDOPT_VISIT
  __builtin_trap();
}

// With the types of a parameter, its gradient and its states.
template <class Visitor>
inline auto visit_storage(int storage, const Visitor& visitor) {
#define FUSEDOPT_VISIT(P, G, S)                                                                    \
  if (storage-- == 0) {                                                                            \
    return visitor(                                                                                \
        Types<StorageOf<DType::P>::Type, StorageOf<DType::G>::Type, StorageOf<DType::S>::Type>{}); \
  }
  FUSEDOPT_FOR_EACH_STORAGE(FUSEDOPT_VISIT)
#undef FUSEDOPT_VISIT
  __builtin_trap();
}

// With the types of a gradient and of its parameter's arithmetic.
template <class Visitor>
inline auto visit_grad(DType grad, DType param, const Visitor& visitor) {
  if (grad == DType::kBF16) return visitor(Types<BF16, float>{});
  if (grad == DType::kF16) return visitor(Types<F16, float>{});
  if (param == DType::kF64) return visitor(Types<double, double>{});
  return visitor(Types<float, float>{});
}

}  // namespace fusedopt
