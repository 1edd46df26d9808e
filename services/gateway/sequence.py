"""One sequence of a request: its tokens, its text, and how it ends.

It lives through every worker that it is moved to: tokens already delivered stay
in `generated`, the text's state goes on, and the next worker is given both.
It decides nothing about where to go.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

from headrace.blocks import pack_tokens
from headrace.errors import Internal, Unavailable
from services.gateway.detokenizer import Detokenizer
from services.gateway.stop_strings import StopMatcher

if TYPE_CHECKING:
    from headrace.params import SamplingParams
    from services.gateway.generation import EndReason
    from services.gateway.leg import Leg
    from services.gateway.models import Model
    from services.gateway.running import RunningRequest
    from services.gateway.submission import End
    from services.gateway.workers import Ticket


class Sequence:
    """A listener (see `submission.Listener`) that feeds its request's sink.

    `sampling` has its seed and max_tokens set.
    """

    __slots__ = (
        "_detokenizer",
        "_hidden",
        "_matcher",
        "_request",
        "attempts",
        "cached_tokens",
        "failed_on",
        "generated",
        "index",
        "is_closed",
        "kills",
        "leg",
        "progressed",
        "reason",
        "sampling",
        "ticket",
    )

    def __init__(
        self,
        request: RunningRequest,
        index: int,
        sampling: SamplingParams,
        model: Model,
        stops: tuple[str, ...],
    ) -> None:
        self.index = index
        self.sampling = sampling
        self.generated = array("I")
        #: Why it ended, for the client; the worker may not have said its last word then.
        self.reason: EndReason | None = None
        #: Whether the request counts it as ended, its worker included.
        self.is_closed = False
        self.cached_tokens = 0
        self.ticket: Ticket | None = None
        self.leg: Leg | None = None
        self.attempts = 0
        #: Workers in a row that died of it, perhaps, without a token of it in between.
        self.kills = 0
        self.progressed = False
        #: Ids of workers where it failed.
        self.failed_on: set[str] = set()
        self._request = request
        self._detokenizer = Detokenizer(model.table)
        self._matcher = StopMatcher(stops) if stops else None
        hidden = frozenset(sampling.stop_token_ids)
        self._hidden = hidden if sampling.ignore_eos else hidden | model.table.eos_token_ids

    @property
    def generated_ids(self) -> bytes:
        """All tokens so far, u32 little-endian."""
        return pack_tokens(self.generated)

    def natural_end(self, max_len: int) -> EndReason | None:
        """Why it is complete although no worker said so; `max_len` tokens fit the context."""
        if self.generated and self.generated[-1] in self._hidden:
            return "stop"
        if len(self.generated) >= min(self.sampling.max_tokens or max_len, max_len):
            return "length"
        return None

    # What its worker says.

    def on_tokens(self, token_ids: list[int]) -> None:
        if self.reason is not None:
            return
        if not self.progressed:
            self.progressed = True
            self._request.first_token_of(self)
        if self._matcher is not None:
            self._match(token_ids, self._matcher)
            return
        self.generated.extend(token_ids)
        shown = token_ids[:-1] if token_ids[-1] in self._hidden else token_ids
        self._request.sink.on_delta(self.index, self._detokenizer.push(shown), token_ids)

    def on_end(self, end: End) -> None:
        self.ticket = None
        self.cached_tokens = end.cached_tokens
        if self.reason is not None:
            self._request.over(self)
        elif end.reason == "stop" or end.reason == "length":
            self.finish(end.reason)
        elif end.reason == "cancelled":
            self._request.move(self, Unavailable("the worker stopped it"), died=False)
        elif isinstance(end.error, (Unavailable, Internal)):
            self._request.move(self, end.error, died=isinstance(end.error, Internal))
        else:
            self._request.fail(end.error or Internal())

    def on_lost(self, reason: str, *, died: bool) -> None:
        self.ticket = None
        if self.reason is not None:
            self._request.over(self)
        else:
            self._request.move(self, Unavailable(reason), died=died)

    # How it ends.

    def finish(self, reason: EndReason) -> None:
        """Show what was held back, and end."""
        text = self._detokenizer.flush()
        if self._matcher is not None:
            text, matched = self._matcher.push(text)
            if matched:
                reason = "stop"
            else:
                text += self._matcher.flush()
        self.reason = reason
        if text:
            self._request.sink.on_delta(self.index, text, [])
        self._request.sink.on_end(self.index, reason)
        self._request.over(self)

    def _match(self, token_ids: list[int], matcher: StopMatcher) -> None:
        shown: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            self.generated.append(token_id)
            if token_id in self._hidden:
                continue
            text, matched = matcher.push(self._detokenizer.push([token_id]))
            shown.append(text)
            if matched:
                self.reason = "stop"
                self._request.sink.on_delta(self.index, "".join(shown), token_ids[:count])
                self._request.sink.on_end(self.index, "stop")
                self._request.stopped(self)
                return
        self._request.sink.on_delta(self.index, "".join(shown), token_ids)


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's sequence `index`, 64 bits; the first keeps the request's own."""
    if index == 0:
        return seed
    mixed = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8)
    return int.from_bytes(mixed.digest(), "little")
