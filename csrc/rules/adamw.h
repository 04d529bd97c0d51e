// AdamW: Adam with decoupled weight decay.
//
// Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
// arXiv:1711.05101, Algorithm 2. Variant: torch.optim.AdamW, which multiplies the decay by lr (the
// paper by a schedule multiplier) and applies it before the update. The arithmetic is Adam's, with the
// group's `decoupled_weight_decay`, which torch.optim.AdamW sets.
#pragma once

#include "rules/adam.h"

namespace fusedopt {

using AdamW = Adam;

}  // namespace fusedopt
