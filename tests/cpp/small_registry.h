// Instead of the lists in rules/all.h and core/dtype.h, for tests of drivers, which do not depend on
// the rule: included by the compiler's command line. No state to three, and each storage type once.
#define FUSEDOPT_FOR_EACH_RULE(RULE) \
  RULE("sgd", Sgd)                   \
  RULE("adamw", AdamW)
#define FUSEDOPT_FOR_EACH_STORAGE(STORAGE) \
  STORAGE(kF32, kF32, kF32)                \
  STORAGE(kF64, kF64, kF64)                \
  STORAGE(kBF16, kBF16, kF32)              \
  STORAGE(kF16, kF16, kF32)
