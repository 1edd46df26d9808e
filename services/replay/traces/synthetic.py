"""Traces from a description, for what no recording has.

    synthetic:requests=2000,rate=8,prefixes=20,prefix=1500,turns=3,prompt=400,output=200

Conversations begin as a Poisson process. Each opens with one of `prefixes` shared
prefixes, drawn by Zipf's law (a few system prompts have most of the traffic), and has
`turns` turns on average (geometric); each turn's prompt is all before it, answers
included, and a new message. Message and answer lengths are log-normal with the means
`prompt` and `output`. With `prefixes=0,turns=1`, the default, nothing is shared.
Equal descriptions give equal traces.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.replay.traces.base import (
    MAX_HASH_IDS,
    MAX_OUTPUT_TOKENS,
    MAX_PROMPT_TOKENS,
    MAX_REQUESTS,
    SYNTHETIC,
    Place,
    TraceOptions,
    collect,
)
from services.replay.workload import Trace, TraceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 64
#: Until the next turn begins, besides `think`: what a token of the answer takes.
MS_PER_TOKEN = 20.0


@dataclass(frozen=True, slots=True)
class Spec:
    """What a description may say. Lengths are in tokens, times in seconds."""

    requests: int = 1000
    #: Requests per second over all conversations.
    rate: float = 4.0
    #: Mean length of a new message, and of an answer.
    prompt: int = 1000
    output: int = 200
    #: Standard deviation of the lengths' logarithms; 0: all are equal.
    spread: float = 0.6
    #: How many shared prefixes there are, how long each is, and Zipf's exponent.
    prefixes: int = 0
    prefix: int = 1000
    zipf: float = 1.0
    #: Mean turns of a conversation, and the mean pause between two (exponential).
    turns: float = 1.0
    think: float = 10.0
    seed: int = 0


_LIMITS: dict[str, tuple[float, float]] = {
    "requests": (1, MAX_REQUESTS),
    "rate": (1e-6, 1e6),
    "prompt": (1, MAX_PROMPT_TOKENS // 10),
    "output": (1, MAX_OUTPUT_TOKENS // 10),
    "spread": (0, 3),
    "prefixes": (0, 1_000_000),
    "prefix": (1, MAX_PROMPT_TOKENS // 10),
    "zipf": (0, 10),
    "turns": (1, 1000),
    "think": (0, 86_400),
    "seed": (0, 2**63 - 1),
}


class Synthetic:
    """See TraceReader. The source is the description itself."""

    def recognizes(self, line: str) -> bool:
        """See TraceReader.recognizes."""
        return line.startswith(SYNTHETIC)

    def read(self, source: str, options: TraceOptions) -> Trace:
        """See TraceReader.read."""
        spec = parse(source)
        block_size = options.trace_block_size or BLOCK_SIZE
        requests = ((Place(source), request) for request in generate(spec, block_size))
        return collect(source, requests, block_size=block_size, limit=options.limit)


def parse(source: str) -> Spec:
    """The description `synthetic:KEY=VALUE,…`. Raises StartupError naming key and value."""
    if not source.startswith(SYNTHETIC):
        raise StartupError(
            f"a synthetic trace is described by {SYNTHETIC}KEY=VALUE,…, not {source!r}"
        )
    kinds = _kinds()
    values: dict[str, float] = {}
    for part in source.removeprefix(SYNTHETIC).split(","):
        name, _, text = part.partition("=")
        if not part.strip():
            continue
        if name not in kinds:
            raise StartupError(f"{source}: no such key: {name!r}; known: {', '.join(kinds)}")
        if name in values:
            raise StartupError(f"{source}: {name} is given twice")
        least, most = _LIMITS[name]
        kind = kinds[name]
        try:
            value = kind(text)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise StartupError(f"{source}: {name} must be {what}, not {text!r}") from None
        # Not `< least`: that would let NaN pass.
        if not least <= value <= most:
            raise StartupError(f"{source}: {name} must be from {least:,} to {most:,}, not {text}")
        values[name] = value
    spec = Spec(**values)  # type: ignore[arg-type]  # each is of its field's type, see kinds
    ids = spec.requests * (spec.prefix * bool(spec.prefixes) + spec.prompt) / BLOCK_SIZE
    if ids > MAX_HASH_IDS:
        raise StartupError(f"{source}: about {ids:,.0f} blocks of prompts, limit {MAX_HASH_IDS:,}")
    return spec


def _kinds() -> dict[str, type[int] | type[float]]:
    return {key: int if isinstance(value, int) else float for key, value in asdict(Spec()).items()}


def generate(spec: Spec, block_size: int) -> Iterator[TraceRequest]:
    """The requests of `spec`, by arrival. Ids stand for `block_size` tokens."""
    rng = random.Random(spec.seed)
    families = _families(spec)
    ids = _Ids(block_size)
    begin_s = 0.0
    waiting: list[tuple[float, int, _Conversation]] = []
    for number in range(spec.requests):
        # The next conversation has begun before the next turn of another: it comes first.
        if not waiting or begin_s <= waiting[0][0]:
            family = rng.choices(range(len(families)), cum_weights=families)[0] if families else -1
            begun = _Conversation(f"{number}", family, spec.prefix if family >= 0 else 0)
            heappush(waiting, (begin_s, number, begun))
            begin_s += rng.expovariate(spec.rate / spec.turns)
        arrival_s, _, turn = heappop(waiting)
        turn.num_tokens = min(MAX_PROMPT_TOKENS, turn.num_tokens + _length(rng, spec.prompt, spec))
        output_tokens = min(MAX_OUTPUT_TOKENS, _length(rng, spec.output, spec))
        ids.extend(turn, spec.prefix)
        yield TraceRequest(
            arrival_ms=arrival_s * 1000,
            num_tokens=turn.num_tokens,
            output_tokens=output_tokens,
            hash_ids=tuple(turn.hash_ids),
            session_id=turn.session_id,
        )
        if rng.random() >= 1 / spec.turns:
            turn.num_tokens = min(MAX_PROMPT_TOKENS, turn.num_tokens + output_tokens)
            pause_s = rng.expovariate(1 / spec.think) if spec.think else 0.0
            again_s = arrival_s + output_tokens * MS_PER_TOKEN / 1000 + pause_s
            heappush(waiting, (again_s, number, turn))


class _Conversation:
    """One conversation: how long its prompt is by now, and the ids of its whole pieces."""

    def __init__(self, session_id: str, family: int, num_tokens: int) -> None:
        self.session_id = session_id
        self.family = family
        self.num_tokens = num_tokens
        self.hash_ids: list[int] = []


class _Ids:
    """Gives ids: pieces within a shared prefix one for all, others one for each conversation."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._shared: dict[tuple[int, int], int] = {}
        self._next = 0

    def extend(self, turn: _Conversation, prefix_len: int) -> None:
        """Add the ids of pieces that `turn` has whole by now."""
        num_shared = prefix_len // self._block_size if turn.family >= 0 else 0
        for position in range(len(turn.hash_ids), turn.num_tokens // self._block_size):
            if position < num_shared:
                turn.hash_ids.append(self._shared_id(turn.family, position))
            else:
                turn.hash_ids.append(self._fresh())

    def _shared_id(self, family: int, position: int) -> int:
        key = (family, position)
        if key not in self._shared:
            self._shared[key] = self._fresh()
        return self._shared[key]

    def _fresh(self) -> int:
        self._next += 1
        return self._next - 1


def _families(spec: Spec) -> list[float]:
    """Cumulative Zipf weights of the shared prefixes."""
    total = 0.0
    cumulative = []
    for rank in range(1, spec.prefixes + 1):
        total += rank**-spec.zipf
        cumulative.append(total)
    return cumulative


def _length(rng: random.Random, mean: int, spec: Spec) -> int:
    """A log-normal length of that mean, 1 at least."""
    if not spec.spread:
        return mean
    mu = math.log(mean) - spec.spread**2 / 2
    return max(1, round(rng.lognormvariate(mu, spec.spread)))
