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
from headrace.logprobs import record_len
from services.gateway.detokenizer import Detokenizer
from services.gateway.stop_strings import StopMatcher

if TYPE_CHECKING:
    from headrace.errors import HeadraceError
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
        "_num_prompt_bytes",
        "_num_repeated",
        "_record_len",
        "_request",
        "_scores",
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
        # A chat's answer is a text of its own: so it stands in its template again, next turn.
        self._detokenizer = Detokenizer(
            model.table,
            goes_on=request.request.messages is None,
            skip_special=request.request.skip_special_tokens,
        )
        #: Bytes of a token's log probabilities, 0 if nobody asks; those that came in.
        self._record_len = 0 if sampling.logprobs is None else record_len(sampling.logprobs)
        self._scores = bytearray()
        #: Bytes of the prompt's that were delivered, and that a next worker will repeat.
        self._num_prompt_bytes = 0
        self._num_repeated = 0
        self._matcher = StopMatcher(stops) if stops else None
        hidden = frozenset(sampling.stop_token_ids)
        self._hidden = hidden if sampling.ignore_eos else hidden | model.table.eos_token_ids

    @property
    def generated_ids(self) -> bytes:
        """All tokens so far, u32 little-endian."""
        return pack_tokens(self.generated)

    def natural_end(self, max_len: int) -> EndReason | None:
        """Why it is complete although no worker said so; `max_len` tokens fit the context."""
        generated = self.generated
        if generated and len(generated) >= self.sampling.min_tokens:
            if generated[-1] in self._hidden:
                return "stop"
            for ids in self.sampling.stop_token_sequences:
                if tuple(generated[-len(ids) :]) == ids:
                    return "stop"
        if len(self.generated) >= min(self.sampling.max_tokens or max_len, max_len):
            return "length"
        return None

    # What its worker says.

    def on_tokens(self, token_ids: list[int]) -> None:
        if self.reason is not None:
            return
        if len(self._scores) < len(token_ids) * self._record_len:
            # The worker sent fewer than it promised.
            raise Internal
        if not self.progressed:
            self.progressed = True
            self._request.first_token_of(self)
        if self._matcher is not None:
            self._match(token_ids, self._matcher)
            return
        self.generated.extend(token_ids)
        shown = token_ids[:-1] if token_ids[-1] in self._hidden else token_ids
        self._show(self._detokenizer.push(shown), token_ids)

    def on_logprobs(self, tokens: bytes, prompt: bytes) -> None:
        if self.reason is not None:
            return
        self._scores += tokens
        repeated = min(len(prompt), self._num_repeated)
        self._num_repeated -= repeated
        if new := prompt[repeated:]:
            self._num_prompt_bytes += len(new)
            self._request.sink.on_prompt_logprobs(self.index, new)

    def on_end(self, end: End) -> None:
        self.ticket = None
        self.cached_tokens = end.cached_tokens
        if self.reason is not None:
            self._request.over(self)
        elif end.reason == "stop" or end.reason == "length":
            self.finish(end.reason)
        elif end.reason == "cancelled":
            self._move(Unavailable("the worker stopped it"), died=False)
        elif isinstance(end.error, (Unavailable, Internal)):
            self._move(end.error, died=isinstance(end.error, Internal))
        else:
            self._request.fail(end.error or Internal())

    def on_lost(self, reason: str, *, died: bool) -> None:
        self.ticket = None
        if self.reason is not None:
            self._request.over(self)
        else:
            self._move(Unavailable(reason), died=died)

    def _move(self, error: HeadraceError, *, died: bool) -> None:
        # The next worker begins with the prompt's scores if no token was generated.
        self._num_repeated = self._num_prompt_bytes
        self._scores.clear()
        self._request.move(self, error, died=died)

    def _show(self, text: str, token_ids: list[int]) -> None:
        """Give the sink what came, with its log probabilities if there are to be any."""
        if not self._record_len:
            self._request.sink.on_delta(self.index, text, token_ids)
            return
        length = len(token_ids) * self._record_len
        scores = bytes(self._scores[:length])
        del self._scores[:length]
        self._request.sink.on_delta(self.index, text, token_ids, scores)

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
                self._show("".join(shown), token_ids[:count])
                self._request.sink.on_end(self.index, "stop")
                self._request.stopped(self)
                return
        self._show("".join(shown), token_ids)


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's sequence `index`, 64 bits; the first keeps the request's own."""
    if index == 0:
        return seed
    mixed = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8)
    return int.from_bytes(mixed.digest(), "little")
