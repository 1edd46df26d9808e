"""The CPU's hot loops, compiled at the first start where a C compiler is present.

`kernels()` gives them, or None: then torch's own operations do the work, slower. It
is the only door; `kernels.c` says what is computed and in which order.
"""

from services.worker.engines.torch.kernels.library import (
    ROWS_PER_TILE,
    Activation,
    Kernels,
    Packed,
    Tiles,
    kernels,
    takes_heads,
)

__all__ = [
    "ROWS_PER_TILE",
    "Activation",
    "Kernels",
    "Packed",
    "Tiles",
    "kernels",
    "takes_heads",
]
