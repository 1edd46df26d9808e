"""What is asked, and when it is meant to start. Pure, given a seed.

Closed loop: each of so many clients sends its next request when its last is over; a slow
server slows its own load down. Open loop: requests start at moments drawn beforehand,
whatever the server does, as independent users do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle
from typing import TYPE_CHECKING, Literal, Protocol

from headrace.bench.sample import Prompt
from headrace.bench.traces import Recorded
from headrace.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path

#: Short common words: one token each in most vocabularies, with the space before them.
_VOCABULARY = (
    "time year people way day man thing woman life child world school state family student "
    "group country problem hand part place case week company system program question work "
    "government number night point home water room mother area money story fact month lot "
    "right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city name team minute idea body back parent face"
)
_WORDS = _VOCABULARY.split()

Arrival = Literal["poisson", "constant"]


def words(key: str, num_tokens: int) -> str:
    """Text of about `num_tokens` tokens, the same for the same key."""
    return " ".join(random.Random(key).choices(_WORDS, k=num_tokens))


class Prompts(Protocol):
    """A source of prompts."""

    def stream(self) -> Iterator[Prompt]:
        """From the beginning, without end."""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Prompts of `shared_prefix_len` tokens common to all of one group, and `input_len` of
    their own. Lengths in tokens, about."""

    input_len: int
    output_len: int
    shared_prefix_len: int = 0
    num_groups: int = 1
    seed: int = 0

    def stream(self) -> Iterator[Prompt]:
        groups = random.Random(f"{self.seed} groups")
        prefixes = [
            words(f"{self.seed} prefix {group}", self.shared_prefix_len)
            for group in range(self.num_groups)
        ]
        for number in count():
            own = words(f"{self.seed} request {number}", self.input_len)
            prefix = prefixes[groups.randrange(self.num_groups)]
            yield Prompt(f"{prefix} {own}" if prefix else own, self.output_len)


@dataclass(frozen=True, slots=True)
class FromList:
    """Given prompts, over and over."""

    prompts: Sequence[Prompt]

    def stream(self) -> Iterator[Prompt]:
        return cycle(self.prompts)


@dataclass(frozen=True, slots=True)
class FromTrace:
    """A trace's prompts, over and over; `seed` makes their text another."""

    recorded: Sequence[Recorded]
    seed: int = 0

    def stream(self) -> Iterator[Prompt]:
        for number, recorded in enumerate(cycle(self.recorded)):
            text = recorded.text(self._words, number)
            yield Prompt(text, recorded.output_len)

    def _words(self, key: str, num_tokens: int) -> str:
        return words(f"{self.seed} {key}", num_tokens)


def read_prompts(path: Path, output_len: int) -> FromList:
    """A prompt a line: text, or JSON objects with `prompt` and perhaps `max_tokens`.

    Raises StartupError naming the file and the line.
    """
    prompts = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--prompts {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            prompts.append(Prompt(line, output_len))
            continue
        try:
            record = json.loads(line)
            prompts.append(Prompt(str(record["prompt"]), int(record.get("max_tokens", output_len))))
        except (ValueError, KeyError, TypeError) as error:
            raise StartupError(
                f"--prompts {path}:{number}: must be an object with a prompt, and perhaps "
                f"max_tokens ({type(error).__name__}: {error})"
            ) from error
    if not prompts:
        raise StartupError(f"--prompts {path}: there is no prompt in it")
    return FromList(prompts)


def arrivals(rate: float, kind: Arrival, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests are meant to start, `rate` a second on
    average, without end."""
    rng, at_s = random.Random(f"{seed} arrivals"), 0.0
    while True:
        yield at_s
        at_s += rng.expovariate(rate) if kind == "poisson" else 1 / rate
