"""How long one worker's steps take, learned from its own.

    step = c·P + a·n + s·Σn² + x·Σn·m  +  d·D + q·k + r·K      ms

of a step in which prompts of n new tokens after m cached ones are computed (P: 1 if
there are any) and k sequences decode (D: 1 if any do), whose attention reads K tokens
of KV. Each coefficient is a cost that hardware has: c and d a pass over the weights,
a and q a token's arithmetic, s, x and r attention. Dynamo's mocker polynomial has c,
a, s and, as K grows, d and r.

A worker reports totals of these features and of its time (WorkerLoad in
worker.proto), and the model is linear in them: so what changed between two reports is
one equation, whether it was one step or many, of one kind or mixed. Weighted least
squares over such rows, older ones fading by half every `HALF_LIFE`:

    minimize  Σ w (y - θ·x)² / ŷ²  +  prior     subject to  θ >= 0

- The error is relative: short decode steps count as much as long prefills.
- The prior is what the worker's peers take together, those of the same engine and
  capacity, and weighs as `PEER_ROWS` rows do: of equal workers none should look
  faster than another by chance, and one that is slower shows it within seconds. Where
  there are none it is a worker like the card's engine, weighing `PRIOR_ROWS`. It
  answers alone until there are rows (`calibrated` False), and where rows are silent.
- A row far beyond the usual error weighs little (Huber): one outlier does no harm, a
  lasting change is the usual error soon.
- Coordinate descent from the last solution, a few sweeps a row, keeps θ >= 0 by
  construction (Lawson and Hanson, Solving Least Squares Problems, ch. 23).

Pure: no clock, no worker, no wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from operator import mul
from typing import NamedTuple, TypeAlias

#: Before a worker has computed anything: a small GPU, or a fast CPU model.
PRIOR_PREFILL_MS_PER_TOKEN = 0.1
PRIOR_DECODE_STEP_MS = 10.0
PRIOR_DECODE_MS_PER_SEQUENCE = 0.1
#: Attention costs as much as all else at 36,000 tokens: an 8-billion-parameter model.
QUADRATIC_SHARE = 2.77e-5

#: Rows after which what was measured before counts half.
HALF_LIFE = 256
#: How many rows the prior weighs as: a guess, and what peers measured.
PRIOR_ROWS, PEER_ROWS = 1.0, 32.0
#: Milliseconds of steps that a row spans at least, so that a fast worker's reports
#: cost the router little: the first rows, and later ones.
ROW_MS, LATER_ROW_MS = 20.0, 250.0
_FIRST_ROWS = 128
_SWEEPS = 3
#: Of the usual error: from here on a row counts less.
_HUBER = 3.0


class Timing(NamedTuple):
    """A snapshot of one worker's model: the coefficients above, in ms. (A tuple: policies
    read all of it, for each candidate.)"""

    prefill_step_ms: float = 0.0
    prefill_ms_per_token: float = PRIOR_PREFILL_MS_PER_TOKEN
    prefill_ms_per_square: float = PRIOR_PREFILL_MS_PER_TOKEN * QUADRATIC_SHARE
    prefill_ms_per_context: float = PRIOR_PREFILL_MS_PER_TOKEN * QUADRATIC_SHARE * 2
    decode_step_ms: float = PRIOR_DECODE_STEP_MS
    decode_ms_per_sequence: float = PRIOR_DECODE_MS_PER_SEQUENCE
    decode_ms_per_context: float = 0.0
    #: Prompt tokens that it was seen to compute in one step; 0: not seen.
    step_tokens: int = 0
    #: Whether steps of the worker itself stand behind it, not the prior alone.
    calibrated: bool = False

    def prefill_ms(self, num_tokens: float, num_cached: float = 0) -> float:
        """Milliseconds to compute `num_tokens` that follow `num_cached` ones, alone.

        A prompt longer than a step comes in chunks, each behind those before it.
        """
        if num_tokens <= 0:
            return 0.0
        chunk = min(num_tokens, self.step_tokens or num_tokens)
        steps = -(-num_tokens // chunk)
        squares = num_tokens * chunk
        context = num_tokens * num_cached + (num_tokens * num_tokens - squares) / 2
        return (
            self.prefill_step_ms * steps
            + self.prefill_ms_per_token * num_tokens
            + self.prefill_ms_per_square * squares
            + self.prefill_ms_per_context * context
        )

    def decode_ms(self, num_sequences: float, num_context: float) -> float:
        """Milliseconds of a step of `num_sequences` that read `num_context` tokens of KV."""
        return (
            self.decode_step_ms
            + self.decode_ms_per_sequence * num_sequences
            + self.decode_ms_per_context * num_context
        )

    def queue_ms(self, num_tokens: float, decode_ms: float = 0.0) -> float:
        """Milliseconds of a queue of prompts: full steps, each of which also decodes."""
        step = self.step_tokens
        steps = num_tokens / step if step else 0.0
        per_token = self.prefill_ms_per_token + self.prefill_ms_per_square * step
        return num_tokens * per_token + steps * (self.prefill_step_ms + decode_ms)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a worker's steps did since its start, as it reports it: see the module's docstring."""

    step_ms: float = 0.0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    #: Σ n² and Σ n·m over the chunks of prompts computed.
    prefill_squares: int = 0
    prefill_context: int = 0
    decode_steps: int = 0
    #: Σ k and Σ K over steps.
    decode_sequences: int = 0
    decode_context: int = 0


_NUM_FEATURES = 7
#: What a coefficient may well be, where its prior is less.
_SCALES = (10.0, 1e-3, 1e-8, 1e-8, 1.0, 0.1, 1e-5)


def prior_of(engine: str) -> Timing:
    """What to expect of a worker before any like it has computed: what its engine runs on."""
    per_token = _PRIOR_PER_TOKEN.get(engine, PRIOR_PREFILL_MS_PER_TOKEN)
    return Timing(
        prefill_ms_per_token=per_token,
        prefill_ms_per_square=per_token * QUADRATIC_SHARE,
        prefill_ms_per_context=per_token * QUADRATIC_SHARE * 2,
    )


#: TensorRT-LLM runs on large GPUs only.
_PRIOR_PER_TOKEN = {"tensorrt_llm": 0.03}


#: What several steps did, by feature, and their milliseconds.
Row: TypeAlias = "tuple[list[int], float]"


class LatencyModel:
    """One worker's timing, or that of several alike, calibrated by `learn`."""

    def __init__(self, prior: Timing | None = None) -> None:
        self._last = Totals()
        #: Equations learned from.
        self.num_rows = 0
        self._matrix = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._vector = [0.0] * _NUM_FEATURES
        #: The usual relative error of a row.
        self._error = 1.0
        self._step_tokens = 0
        self.expect(prior or Timing())

    def expect(self, prior: Timing, rows: float = PRIOR_ROWS) -> None:
        """Take another prior, which weighs as so many rows."""
        self._prior: tuple[float, ...] = prior[:_NUM_FEATURES]
        #: The prior pulls each coefficient by its deviation relative to its scale.
        self._stiffness = [
            rows / _NUM_FEATURES / max(value, scale) ** 2
            for value, scale in zip(self._prior, _SCALES, strict=True)
        ]
        if not self.num_rows:
            self._theta = list(self._prior)
            self._step_tokens = prior.step_tokens
            self.timing = prior

    def observe(self, totals: Totals) -> Row | None:
        """Take in the worker's present totals, and return what is new of them, to be learned.

        None: too little is. Totals that fell are those of a new start.
        """
        last = self._last
        if _fell(last, totals):
            last = self._last = Totals()
        elapsed = totals.step_ms - last.step_ms
        needed = ROW_MS if self.num_rows < _FIRST_ROWS else LATER_ROW_MS
        if not needed <= elapsed < float("inf"):
            return None
        self._last = totals
        row = [
            totals.prefill_steps - last.prefill_steps,
            totals.prefill_tokens - last.prefill_tokens,
            totals.prefill_squares - last.prefill_squares,
            totals.prefill_context - last.prefill_context,
            totals.decode_steps - last.decode_steps,
            totals.decode_sequences - last.decode_sequences,
            totals.decode_context - last.decode_context,
        ]
        return (row, elapsed) if row[0] + row[4] > 0 else None

    def learn(self, new: Row) -> None:
        """Take in one more equation, this worker's or another's like it."""
        row, elapsed = new
        self._add(row, elapsed)
        self._solve()
        if row[1]:
            # The mean size of the step that a token was computed in.
            self._step_tokens = max(self._step_tokens, -(-row[2] // row[1]))
        self.num_rows += 1
        c, a, s, x, d, q, r = self._theta
        self.timing = Timing(c, a, s, x, d, q, r, self._step_tokens, calibrated=True)

    def _add(self, row: list[int], elapsed: float) -> None:
        """One more equation, the older ones fading."""
        theta, matrix, vector = self._theta, self._matrix, self._vector
        predicted = sum(map(mul, theta, row))
        # Neither a prediction near nothing nor a huge measurement decides the scale alone.
        scale = max(predicted, min(elapsed, 10 * predicted + 1.0))
        deviation = abs(elapsed - predicted) / scale
        limit = _HUBER * self._error
        weight = 1.0 if deviation <= limit else limit / deviation
        self._error += 0.05 * (min(deviation, 2 * limit) - self._error) + 1e-6
        weight /= scale * scale
        fade = 0.5 ** (1 / HALF_LIFE)
        used = [i for i, x in enumerate(row) if x]
        for line in matrix:
            line[:] = [value * fade for value in line]
        vector[:] = [value * fade for value in vector]
        for i in used:
            weighted, line = weight * row[i], matrix[i]
            vector[i] += weighted * elapsed
            for j in used:
                line[j] += weighted * row[j]

    def _solve(self) -> None:
        """A few sweeps of coordinate descent towards the solution, none below 0."""
        theta, prior = self._theta, self._prior
        # As a prior of that variance among errors of this one.
        variance = self._error**2
        equations = []
        for i, (line, stiffness) in enumerate(zip(self._matrix, self._stiffness, strict=True)):
            ridge = stiffness * variance
            own = line[i]
            equations.append((i, line, own, own + ridge, self._vector[i] + ridge * prior[i]))
        for _ in range(_SWEEPS):
            for i, line, own, divisor, wanted in equations:
                value = (wanted - (sum(map(mul, line, theta)) - own * theta[i])) / divisor
                theta[i] = value if 0 < value < inf else 0.0


def _fell(last: Totals, totals: Totals) -> bool:
    return totals.step_ms < last.step_ms or totals.prefill_tokens < last.prefill_tokens
