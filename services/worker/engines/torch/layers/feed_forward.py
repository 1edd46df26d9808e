"""Feed-forwards: one for all tokens, and experts of which each token uses some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from services.worker.engines.torch.kernels import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.worker.engines.torch.kernels import Activation
    from services.worker.engines.torch.layers.linear import Linear


def silu(x: torch.Tensor) -> torch.Tensor:
    """x · sigmoid(x)."""
    return F.silu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (https://arxiv.org/abs/1606.08415)."""
    return F.gelu(x, approximate="tanh")


#: What the CPU's kernel knows of them.
_COMPILED: dict[Callable[[torch.Tensor], torch.Tensor], Activation] = {
    silu: "silu",
    gelu_tanh: "gelu_tanh",
}


class GatedMLP:
    """down(activate(gate x) · up x), gate and up from one product: [T, E] -> [T, E].

    `gate_up` gives gates first. https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self,
        gate_up: Linear,
        down: Linear,
        size: int,
        activate: Callable[[torch.Tensor], torch.Tensor] = silu,
    ) -> None:
        self._gate_up = gate_up
        self._down = down
        self._size = size
        self._activate = activate
        self._compiled = _COMPILED.get(activate) if size % 8 == 0 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self._gate_up(x)  # [T, 2F]
        is_plain = both.device.type == "cpu" and both.dtype == torch.float32
        if self._compiled is not None and is_plain and (found := kernels()) is not None:
            return self._down(found.gate(both, self._compiled))
        gated = self._activate(both[:, : self._size]).mul_(both[:, self._size :])
        return self._down(gated)


class Experts:
    """A router's choice of `num_used` experts for each token: [T, E] -> [T, E].

    Tokens are sorted by expert, so that each expert multiplies once; none is
    dropped. A token's results are added in the order of the router's choice,
    whatever else is in the step.
    """

    def __init__(
        self, router: Linear, experts: Sequence[GatedMLP], num_used: int, *, normalize: bool
    ) -> None:
        self._router = router
        self._experts = experts
        self._num_used = num_used
        self._normalize = normalize

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        shares = self._router(x).float().softmax(-1)  # [T, N]
        weights, chosen = shares.topk(self._num_used)  # [T, k]
        if self._normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # [T · k], an expert's side by side
        rows = x[order // self._num_used]
        counts = torch.bincount(chosen, minlength=len(self._experts)).tolist()
        found = torch.empty_like(rows)
        first = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                found[first : first + count] = expert(rows[first : first + count])
                first += count
        by_choice = torch.empty_like(found)
        by_choice[order] = found
        shaped = by_choice.view(len(x), self._num_used, -1)  # [T, k, E]
        return (shaped * weights.unsqueeze(-1).to(x.dtype)).sum(1)
