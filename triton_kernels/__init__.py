"""The Triton backend, installed as `fusedopt.triton_kernels`.

One file a rule, the line-for-line twin of `csrc/rules/<rule>.h`; `math.py`, the helpers of
`csrc/rules/rule.h`; `layout.py`, where numbers lie in memory; `multi_tensor.py`, the kernels of an
update; `norm.py`, those before it; `launcher.py`, what launches them.
"""

from __future__ import annotations

import re

OLDEST = (3, 6)


def missing() -> str:
    """Why Triton cannot be used here, "" if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if not triton.knobs.runtime.interpret:
        try:
            triton.runtime.driver.active.get_current_device()
        except Exception as error:  # whatever a driver that does not start raises
            reason = str(error).partition("\n")[0]
            return f"triton finds no device to run on, and TRITON_INTERPRET=1 is not set: {reason}"
    return ""
