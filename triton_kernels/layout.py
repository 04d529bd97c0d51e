"""Where the numbers lie that the host writes and kernels read: constants out of the extension.

A table is the byte image that ``csrc/device/image.h`` makes of the structs in ``table.h`` and
``prepare.h`` beside it; a decision is that of ``csrc/core/decision.h``. `layout` in
``csrc/plan/triton.cpp`` has the names, so that no number is written twice.
"""

import triton.language as tl

from fusedopt import _C

globals().update({name: tl.constexpr(place) for name, place in _C.layout().items()})
# A row's arrays by their place: the parameter is 0, states follow the gradient.
GRAD = tl.constexpr(1)
