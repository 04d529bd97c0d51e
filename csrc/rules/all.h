// The registry: one entry a rule, its name as in `torch.ops` and file names, and its struct. Every
// driver, the plan and the tests are generated from this list. A test may define a shorter one.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamw.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

#ifndef FUSEDOPT_FOR_EACH_RULE
#define FUSEDOPT_FOR_EACH_RULE(RULE) \
  RULE("sgd", Sgd)                   \
  RULE("adagrad", Adagrad)           \
  RULE("rmsprop", RmsProp)           \
  RULE("adam", Adam)                 \
  RULE("adamw", AdamW)
#endif
