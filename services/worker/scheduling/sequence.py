"""A sequence inside an engine: its tokens, its blocks, how far it is, when things happened.

It knows what ends it and what its blocks are called; it does not decide when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.blocks import ID_LEN, block_ids, pack_tokens
from headrace.errors import InvalidArgument
from services.worker.engine import SequenceEnd
from services.worker.scheduling.waiting import PATIENCE_S

if TYPE_CHECKING:
    from headrace.blocks import BlockId
    from services.worker.engine import EndReason, EngineInfo, SequenceRequest


class SequenceState:
    """One accepted or refused request. Mutated by the engine core only.

    `num_computed` tokens have their KV in the blocks of `tables`, one a KV group, the
    first `num_registered` of which are full and known to the prefix cache. A table of
    a windowed group holds nothing before its entry of `firsts`:

        block of the sequence    0  1  2  3  4  5
        table, first = 3                  7  2  9
    """

    __slots__ = (
        "_block_ids", "_block_size", "_max_len", "_min_tokens", "_namespace_key", "_stop_sequences",
        "cached_tokens", "end_token_ids", "first_token_at", "firsts", "num_computed",
        "num_prompt_tokens", "num_registered", "num_scored", "num_tokens", "order", "request",
        "sequence_id", "started_at", "submitted_at", "tables", "tenant", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: SequenceRequest,
        info: EngineInfo,
        max_len: int,
        arrival: int,
        submitted_at: float,
    ) -> None:
        self.request = request
        self.sequence_id = request.sequence_id
        self.tenant = request.tenant
        patience = request.timeout_ms / 1000 if request.timeout_ms else PATIENCE_S
        #: The scheduler's order, smaller is served first: priority, when due, arrival.
        self.order = (-request.priority, submitted_at + patience, arrival)
        self.tokens = request.prompt_ids + request.generated_ids
        #: Tokens known: prompt and generated.
        self.num_tokens = len(self.tokens)
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_computed = 0
        self.num_registered = 0
        self.tables: list[list[int]] = []
        self.firsts: list[int] = []
        self.submitted_at = submitted_at
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.cached_tokens = 0
        sampling = request.sampling
        self.end_token_ids = frozenset(
            sampling.stop_token_ids + (() if sampling.ignore_eos else info.eos_token_ids)
        )
        self._min_tokens = sampling.min_tokens
        self._stop_sequences = [list(ids) for ids in sampling.stop_token_sequences]
        #: Prompt tokens whose log probabilities are out; the first token has none, and
        #: who resumes behind the prompt has all.
        wants_scores = sampling.prompt_logprobs is not None and not request.generated_ids
        self.num_scored = 1 if wants_scores else self.num_prompt_tokens
        self._max_len = max_len
        if sampling.max_tokens is not None:
            self._max_len = min(self._max_len, self.num_prompt_tokens + sampling.max_tokens)
        self._block_ids: list[BlockId] = []
        self._block_size = info.block_size
        self._namespace_key = request.namespace_key

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        return self._max_len - self.num_tokens

    @property
    def num_generated(self) -> int:
        """Generated tokens, those of before a resume included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_blocks(self) -> int:
        """Length of its tables, what windowed groups gave up counted."""
        return self.firsts[0] + len(self.tables[0]) if self.tables else 0

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its last token is still to be computed."""
        return self.num_tokens - self.num_computed > 1

    def block_ids(self, count: int) -> list[BlockId]:
        """Ids of its first `count` blocks, all full. Computed once, when first asked for."""
        known = self._block_ids
        if len(known) < count:
            packed = pack_tokens(
                self.tokens[len(known) * self._block_size : count * self._block_size]
            )
            known += block_ids(
                packed, self._block_size, known[-1] if known else self._namespace_key
            )
        return known if len(known) == count else known[:count]

    def append(self, token: int, now: float) -> EndReason | None:
        """Take a token generated at `now`. Returns why the sequence is at its end, if it is."""
        self.tokens.append(token)
        self.num_tokens += 1
        if self.first_token_at is None:
            self.first_token_at = now
        return self.ending()

    def ending(self) -> EndReason | None:
        """Why it is at its end after its last generated token, if it is."""
        if self.num_generated >= self._min_tokens and (
            self.tokens[-1] in self.end_token_ids
            or (self._stop_sequences and self._ends_in_stop_sequence())
        ):
            return "stop"
        return "length" if self.num_tokens >= self._max_len else None

    def _ends_in_stop_sequence(self) -> bool:
        return any(
            self.num_generated >= len(ids) and self.tokens[-len(ids) :] == ids
            for ids in self._stop_sequences
        )

    def to_score(self, start: int, end: int) -> range:
        """Positions of prompt tokens that computing tokens `start … end - 1` scores."""
        return range(max(self.num_scored, start + 1), min(end + 1, self.num_prompt_tokens))

    def end(self, reason: EndReason, now: float, error: str = "") -> SequenceEnd:
        """Its end at time `now`, in seconds."""
        started = now if self.started_at is None else self.started_at
        first = now if self.first_token_at is None else self.first_token_at
        return SequenceEnd(
            sequence_id=self.sequence_id,
            reason=reason,
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_generated,
            queue_ms=(started - self.submitted_at) * 1000,
            prefill_ms=(first - started) * 1000,
            decode_ms=(now - first) * 1000,
            stopped_by_token=reason == "stop" and self.tokens[-1] in self.end_token_ids,
            error=error,
        )


def length_fault(num_prompt: int, num_tokens: int, info: EngineInfo, max_len: int) -> str:
    """Why a sequence of so many tokens can never run on this engine; or nothing.

    `max_len` is the longest sequence that context and KV cache allow.
    """
    if not num_prompt:
        return "prompt_ids must not be empty"
    # A resumed sequence may have reached the limit just before it was lost.
    if num_prompt >= max_len or num_tokens > max_len:
        what = "context length" if max_len == info.context_len else "KV cache's size"
        return (
            f"prompt_ids and generated_ids must be fewer than the {what} of {max_len} tokens, "
            f"not {num_tokens}"
        )
    return ""


def fault(request: SequenceRequest, info: EngineInfo, max_len: int) -> str:
    """Why `request` can never run on this engine, naming field, limit and value; or nothing."""
    num_prompt = len(request.prompt_ids)
    num_tokens = num_prompt + len(request.generated_ids)
    if too_long := length_fault(num_prompt, num_tokens, info, max_len):
        return too_long
    for field, ids in (
        ("prompt_ids", request.prompt_ids),
        ("generated_ids", request.generated_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
            bad = next(token for token in ids if not 0 <= token < info.vocab_size)
            return f"{field} must be below the vocabulary size {info.vocab_size}, not {bad}"
    if len(request.namespace_key) != ID_LEN:
        return f"namespace_key must be {ID_LEN} bytes, not {len(request.namespace_key)}"
    try:
        request.sampling.check_vocabulary(info.vocab_size)
    except InvalidArgument as error:
        return error.message
    return ""
