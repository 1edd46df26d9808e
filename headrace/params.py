"""Sampling parameters, validated: one type from the edge to the engine.

It knows what values mean and which are allowed, not which engine supports them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 20
MAX_SEQUENCES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256
MAX_STOP_TOKEN_SEQUENCES = 16
MAX_BAD_TOKEN_SEQUENCES = 256
MAX_TOKEN_SEQUENCE_LEN = 32
MAX_LOGIT_BIAS_ENTRIES = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token.

    `seed` keys the noise: the token at a position is a function of the logits,
    the seed and the position, whatever else is in the batch. `max_tokens` None
    means all that the context leaves.

    Order: bad tokens and end tokens before `min_tokens` are masked, `logit_bias` is
    added, penalties are applied (repetition, frequency, presence), then temperature,
    top-k, top-p, min-p. Log probabilities are those of the model itself: the
    log-softmax of its logits before any of that.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    #: Divides positive and multiplies negative logits of tokens in prompt or output
    #: (https://arxiv.org/abs/1909.05858).
    repetition_penalty: float = 1.0
    #: Subtracted once from logits of tokens in the output; once per occurrence.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: (token id, what is added to its logit), ids distinct.
    logit_bias: tuple[tuple[int, float], ...] = ()
    #: No end token, stop token or stop sequence ends it before this many are generated.
    min_tokens: int = 0
    #: Generated tokens that end it when they come in a row.
    stop_token_sequences: tuple[tuple[int, ...], ...] = ()
    #: Tokens that must not be generated in a row (one: never).
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    #: Report each generated token's log probability and those of this many likeliest.
    logprobs: int | None = None
    #: The same for each token of the prompt but the first.
    prompt_logprobs: int | None = None

    def validate(self) -> SamplingParams:
        """Return itself. Raises InvalidArgument naming the field, the limit and the value."""
        self._check_numbers()
        self._check_lengths()
        ids = [token for token, _ in self.logit_bias]
        if len(set(ids)) != len(ids):
            twice = next(token for token in ids if ids.count(token) > 1)
            raise InvalidArgument(
                f"logit_bias must name a token once, not {twice} twice", field="logit_bias"
            )
        for token, bias in self.logit_bias:
            _within(f"logit_bias[{token}]", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        return self

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidArgument naming a field that the vocabulary is too small for."""
        for field, ids in self._token_ids():
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise InvalidArgument(
                    f"{field}: token ids must be below the vocabulary size {vocab_size}, "
                    f"not {wrong}",
                    field=field,
                )
        for field in ("logprobs", "prompt_logprobs"):
            _at_most(field, getattr(self, field), vocab_size)

    def _token_ids(self) -> Iterable[tuple[str, Sequence[int]]]:
        yield "stop_token_ids", self.stop_token_ids
        yield "logit_bias", [token for token, _ in self.logit_bias]
        for name in ("stop_token_sequences", "bad_token_sequences"):
            for index, sequence in enumerate(getattr(self, name)):
                yield f"{name}[{index}]", sequence

    def _check_numbers(self) -> None:
        _within("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _within("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _within(
            "repetition_penalty",
            self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, low_open=True,
        )  # fmt: skip
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise InvalidArgument(
                    f"{name} must be 0 or more, not {getattr(self, name)}", field=name
                )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidArgument(
                f"max_tokens must be 1 or more, not {self.max_tokens}", field="max_tokens"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}",
                field="min_tokens",
            )
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidArgument(f"seed must fit 64 bits, not {self.seed}", field="seed")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_lengths(self) -> None:
        for name, limit, what in (
            ("stop_token_ids", MAX_STOP_TOKEN_IDS, "ids"),
            ("logit_bias", MAX_LOGIT_BIAS_ENTRIES, "entries"),
            ("stop_token_sequences", MAX_STOP_TOKEN_SEQUENCES, "sequences"),
            ("bad_token_sequences", MAX_BAD_TOKEN_SEQUENCES, "sequences"),
        ):
            if len(getattr(self, name)) > limit:
                raise InvalidArgument(
                    f"{name} must hold at most {limit} {what}, not {len(getattr(self, name))}",
                    field=name,
                )
        for name in ("stop_token_sequences", "bad_token_sequences"):
            for index, sequence in enumerate(getattr(self, name)):
                if not 1 <= len(sequence) <= MAX_TOKEN_SEQUENCE_LEN:
                    field = f"{name}[{index}]"
                    raise InvalidArgument(
                        f"{field} must have 1 to {MAX_TOKEN_SEQUENCE_LEN} token ids, "
                        f"not {len(sequence)}",
                        field=field,
                    )


def _at_most(field: str, value: int | None, vocab_size: int) -> None:
    if value is not None and value > vocab_size:
        raise InvalidArgument(
            f"{field} must be at most the vocabulary size {vocab_size}, not {value}", field=field
        )


def _within(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    below = value <= low if low_open else value < low
    if below or value > high or math.isnan(value):
        bracket = "(" if low_open else "["
        raise InvalidArgument(
            f"{field} must be in {bracket}{low:g}, {high:g}], not {value:g}", field=field
        )
