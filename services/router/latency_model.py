"""How long one worker takes, learned from its own steps.

    prefill of n tokens after m cached ones:  a · (n + Q · ((m + n)² − m²))  ms
    one decode step:                          d                             ms

`a` and `d` are running averages over the worker's totals (see WorkerLoad in
worker.proto), old steps fading by half every `…_HALF_LIFE`; a prior stands in
until there are steps, and fades the same way. The totals do not say at which
lengths a step computed, so the quadratic share Q (attention) is a constant: the
one in Dynamo's mocker polynomial (4.21e-7 n² against 1.518e-2 n), where
attention costs as much as all else at 36,000 tokens.

Pure: no clock, no worker, no wire.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Before a worker has computed anything: a small GPU, or a fast CPU model.
PRIOR_PREFILL_MS_PER_TOKEN = 0.1
PRIOR_DECODE_STEP_MS = 10.0
#: How much computing the prior weighs as.
_PRIOR_TOKENS = 128
_PRIOR_STEPS = 4

#: Tokens and steps after which what was measured before counts half.
PREFILL_HALF_LIFE = 8192
DECODE_HALF_LIFE = 256

#: Attention's share: see the module's docstring.
QUADRATIC_SHARE = 2.77e-5


@dataclass(frozen=True, slots=True)
class Timing:
    """A snapshot of one worker's model."""

    prefill_ms_per_token: float = PRIOR_PREFILL_MS_PER_TOKEN
    decode_step_ms: float = PRIOR_DECODE_STEP_MS
    #: Whether steps of the worker itself stand behind it, not the prior alone.
    calibrated: bool = False

    def prefill_ms(self, num_tokens: int, num_cached: int = 0) -> float:
        """Milliseconds to compute `num_tokens` that follow `num_cached` ones."""
        quadratic = QUADRATIC_SHARE * num_tokens * (num_tokens + 2 * num_cached)
        return self.prefill_ms_per_token * (num_tokens + quadratic)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a worker has computed since its start, as it reports it."""

    prefill_tokens: int = 0
    prefill_ms: float = 0.0
    decode_steps: int = 0
    decode_ms: float = 0.0


class LatencyModel:
    """One worker's timing, calibrated by `observe`."""

    def __init__(self, prior: Timing | None = None) -> None:
        self.timing = prior or Timing()
        self._last: Totals | None = None
        self._prefill = _Average(self.timing.prefill_ms_per_token, _PRIOR_TOKENS, PREFILL_HALF_LIFE)
        self._decode = _Average(self.timing.decode_step_ms, _PRIOR_STEPS, DECODE_HALF_LIFE)

    def observe(self, totals: Totals) -> None:
        """Take in the worker's present totals. Totals that fell are those of a new start."""
        last, self._last = self._last, totals
        if last is None or _fell(last, totals):
            last = Totals()
        num_tokens = totals.prefill_tokens - last.prefill_tokens
        num_steps = totals.decode_steps - last.decode_steps
        if num_tokens <= 0 and num_steps <= 0:
            return
        self._prefill.add(num_tokens, totals.prefill_ms - last.prefill_ms)
        self._decode.add(num_steps, totals.decode_ms - last.decode_ms)
        self.timing = Timing(self._prefill.value, self._decode.value, calibrated=True)


def _fell(last: Totals, totals: Totals) -> bool:
    return totals.prefill_tokens < last.prefill_tokens or totals.decode_steps < last.decode_steps


class _Average:
    """Milliseconds per unit, over units that fade by half every `half_life` of them."""

    def __init__(self, prior: float, weight: float, half_life: float) -> None:
        self.value = prior
        self._units = weight
        self._ms = prior * weight
        self._half_life = half_life

    def add(self, units: float, ms: float) -> None:
        if units <= 0 or ms < 0:
            return
        fade = 0.5 ** (units / self._half_life)
        self._units = self._units * fade + units
        self._ms = self._ms * fade + ms
        self.value = self._ms / self._units
