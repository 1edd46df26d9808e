"""A checkpoint's tensors by name, checked against what a model asks for.

It knows formats only through `Checkpoint`, and models only by the names and
shapes that they ask for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from headrace.errors import StartupError
from services.worker.engines.torch.weights.gguf import GgufCheckpoint
from services.worker.engines.torch.weights.safetensors import SafetensorsCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from headrace.models.files import ModelFiles

#: Names shown in an error before "and N more".
_SHOWN = 3
#: Least advance between two reports.
_REPORT_STEP = 0.02


class Checkpoint(Protocol):
    """Tensors in files. Headers are checked when it is opened."""

    @property
    def path(self) -> Path:
        """What errors name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Each tensor's shape, outermost first."""

    def read_into(self, name: str, out: torch.Tensor, index: int | None = None) -> None:
        """Write a tensor, dequantized, into `out` of its shape, converted to out's type.

        With `index`, that entry of its outermost dimension alone.
        """


class Naming(Protocol):
    """What a model knows of a file format: its tensors' names and arrangement."""

    def rename(self, name: str) -> str | None:
        """The model's name of a checkpoint's tensor; None for one that it does without.

        With a `*` in it, which stands for a number, the tensor holds many: one for
        each entry of its outermost dimension.
        """

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """Rearrange in place a weight with the model's `name`."""


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The weights of a model. Raises StartupError naming file, tensor and fault."""
    if files.format == "gguf":
        return GgufCheckpoint(files.path)
    return SafetensorsCheckpoint(files.path)


class _Place(NamedTuple):
    """A checkpoint's tensor, or the `entry` of its outermost dimension."""

    tensor: str
    shape: tuple[int, ...]
    entry: int | None = None


class Weights:
    """Hands a checkpoint's tensors to a model, under the model's names.

    Reports `("loading weights", fraction)`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        naming: Naming,
        report: Callable[[str, float | None], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._naming = naming
        #: Model's name -> place in the checkpoint, of what was not taken yet.
        self._left: dict[str, _Place] = {}
        for theirs, shape in checkpoint.shapes.items():
            for ours, place in _places(naming.rename(theirs), theirs, shape):
                if ours in self._left:
                    self.fail(f"tensors {self._left[ours].tensor} and {theirs} are both {ours}")
                self._left[ours] = place
        self._total = sum(math.prod(place.shape) for place in self._left.values())
        self._done = 0
        self._report = report
        self._reported = -1.0

    def take(self, name: str, out: torch.Tensor) -> None:
        """Fill `out` with a tensor. Raises StartupError if it is missing, misshapen or not finite.

        The sum of an infinite or undefined number is neither finite: one pass finds all.
        """
        place = self._left.pop(name, None)
        if place is None:
            self.fail(f"tensor {name} is missing")
        theirs = place.tensor
        if place.shape != tuple(out.shape):
            self.fail(
                f"tensor {theirs} has shape {list(place.shape)}, but the model's config asks for "
                f"{list(out.shape)}"
            )
        self._checkpoint.read_into(theirs, out, place.entry)
        if not math.isfinite(out.sum().item()):
            self.fail(f"tensor {theirs} holds NaN or infinite values: fetch it again")
        self._naming.restore(name, out)
        self._done += out.numel()
        fraction = self._done / self._total
        if fraction - self._reported >= _REPORT_STEP or fraction == 1.0:
            self._reported = fraction
            self._report("loading weights", fraction)

    def finish(self) -> None:
        """Raise StartupError for tensors that the model did not ask for."""
        if self._left:
            names = dict.fromkeys(place.tensor for place in self._left.values())
            self.fail(f"the model has no place for tensor {_some(list(names))}")

    def fail(self, reason: str) -> NoReturn:
        """Raise StartupError naming the file."""
        raise StartupError(f"weights {self._checkpoint.path}: {reason}")


def _places(ours: str | None, theirs: str, shape: tuple[int, ...]) -> Iterator[tuple[str, _Place]]:
    """The model's names of what a checkpoint's tensor holds."""
    if ours is None:
        return
    if "*" not in ours:
        yield ours, _Place(theirs, shape)
        return
    for index in range(shape[0] if shape else 0):
        yield ours.replace("*", str(index)), _Place(theirs, shape[1:], index)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
