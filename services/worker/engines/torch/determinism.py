"""Whether logits can be promised to the bit: in any batch, chunking and cache state.

The CPU's kernels compute each number in one order, whatever else a step holds
(kernels/kernels.c). Torch's own operations promise no such thing: products and
sums are cut by the number of rows, and of an elementwise function's vectors the
odd ones at the end round otherwise. So the promise holds where every product, sum
and transcendental function of a model is a kernel's; what is left to torch is
exact (copies, sums of two, choices) or works row by row. On CUDA nothing is promised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headrace.errors import StartupError
from services.worker.engines.torch.kernels import kernels, takes_heads

if TYPE_CHECKING:
    from services.worker.engines.torch.device import Placement
    from services.worker.model_config import ModelConfig


def obstacle(args: ModelConfig, placement: Placement) -> str | None:
    """What keeps logits from being the same to the bit; None: they are."""
    if placement.device.type != "cpu":
        return f"the device is {placement.device}, and only the CPU's kernels promise it"
    if placement.compute_dtype != torch.float32:
        return f"sums in {placement.compute_dtype} are torch's own"
    if kernels() is None:
        return "the CPU kernels could not be compiled (is there a C compiler, cc?)"
    if not takes_heads(args.num_heads, args.num_kv_heads, args.head_dim):
        return f"the attention kernel does not take heads of {args.head_dim}"
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": args.intermediate_size}
    if args.experts is not None:
        sizes["experts' intermediate_size"] = args.experts.intermediate_size
    sizes |= {"half the rotary_dim": args.rope.rotary_dim // 2}
    for name, size in sizes.items():
        if size % 8:
            return f"{name} is {size}, not a multiple of 8"
    if args.final_soft_cap is not None:
        return "the model caps its logits"
    return None


def require(args: ModelConfig, placement: Placement) -> None:
    """Raise StartupError unless logits are the same to the bit."""
    if found := obstacle(args, placement):
        raise StartupError(f"deterministic: can't be promised here, {found}")
