"""From a spec (NAME or NAME:KEY=VALUE,…) to a timing model. Bad ones name what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.worker.model_config import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engines.sim.timing.base import StepTiming

TIMINGS = {
    "linear": "services.worker.engines.sim.timing.linear:create",
    "polynomial": "services.worker.engines.sim.timing.polynomial:create",
    "roofline": "services.worker.engines.sim.timing.roofline:create",
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a spec is silent: the three constants of `linear`, in ms, and the
    model that `roofline` takes the shape of."""

    step_ms: float = 10.0
    step_ms_per_sequence: float = 0.0
    prefill_ms_per_token: float = 0.1
    model: ModelConfig | None = None


_NOTHING = Defaults()


class Options:
    """The KEY=VALUE part of a spec. What is not taken from it is refused by `finish`."""

    def __init__(self, name: str, values: dict[str, str]) -> None:
        self._name = name
        self._values = values
        self._known: list[str] = []

    def text(self, key: str, default: str) -> str:
        """The value under `key`."""
        self._known.append(key)
        return self._values.pop(key, default)

    def number(self, key: str, default: float, *, least: float = 0.0) -> float:
        """A number of at least `least`. Raises StartupError."""
        given = self.text(key, "")
        try:
            value = float(given) if given else default
        except ValueError:
            value = float("nan")
        # Not `< least`: that would let NaN pass.
        if not least <= value < float("inf"):
            raise StartupError(
                f"sim timing {self._name!r}: {key} must be a number of {least:g} or more, "
                f"not {given!r}"
            )
        return value

    def choice(self, key: str, default: str, allowed: list[str]) -> str:
        """One of `allowed`. Raises StartupError."""
        value = self.text(key, default)
        if value not in allowed:
            raise StartupError(
                f"sim timing {self._name!r}: {key} {value!r} is unknown; "
                f"there are {', '.join(sorted(allowed))}"
            )
        return value

    def finish(self) -> None:
        """Raises StartupError if something was given that nobody asked for."""
        if self._values:
            raise StartupError(
                f"sim timing {self._name!r} has no {', '.join(sorted(self._values))}; "
                f"it has {', '.join(self._known) or 'no options'}"
            )


def create(spec: str, defaults: Defaults = _NOTHING) -> StepTiming:
    """The timing model that `spec` names. Raises StartupError for what is unknown or impossible."""
    name, _, rest = spec.partition(":")
    if name not in TIMINGS:
        raise StartupError(
            f"sim timing {name!r} is unknown; there are {', '.join(sorted(TIMINGS))}"
        )
    values: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in values:
            raise StartupError(
                f"sim timing {name!r}: options must be KEY=VALUE, each once, not {part!r}"
            )
        values[key] = value
    module, _, attribute = TIMINGS[name].partition(":")
    make: Callable[[Options, Defaults], StepTiming] = getattr(import_module(module), attribute)
    options = Options(name, values)
    timing = make(options, defaults)
    options.finish()
    return timing
