"""What calls return: plain data, made of the wire's messages and free of them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from headrace.v1 import types_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headrace.v1 import inference_pb2 as pb

#: Why a sequence ended: an end token, stop token or stop string; or a limit.
FinishReason = Literal["stop", "length"]

_REASONS: dict[int, FinishReason] = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call; `cached_tokens` of the prompt's came from a worker's KV cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability; its bytes if asked for."""

    token_id: int
    logprob: float
    text: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token that stands there, and the likeliest, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What came of one sequence since the last time. `text` never ends inside a character."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    #: Set on the sequence's last delta only.
    finish_reason: FinishReason | None
    #: Set on the call's last delta only.
    usage: Usage | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(slots=True)
class Choice:
    """One of the n sequences, whole."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Generation:
    """A whole answer."""

    request_id: str
    choices: list[Choice]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text: all there is with n = 1."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served now."""

    name: str
    context_len: int
    modalities: tuple[str, ...]
    num_workers: int
    revision: str
    #: Seconds since the epoch.
    created: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A vector for each input, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


class Collector:
    """Deltas put together. Pure."""

    def __init__(self) -> None:
        self._request_id = ""
        self._choices: dict[int, Choice] = {}
        self._texts: dict[int, list[str]] = {}
        self._usage = Usage(0, 0, 0)

    def add(self, delta: Delta) -> None:
        """The next delta of the call."""
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = Choice(delta.index)
            self._texts[delta.index] = []
        self._texts[delta.index].append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.prompt_logprobs += delta.prompt_logprobs
        choice.finish_reason = delta.finish_reason or choice.finish_reason
        self._request_id = delta.request_id
        self._usage = delta.usage or self._usage

    def result(self) -> Generation:
        """All that was added."""
        for index, choice in self._choices.items():
            choice.text = "".join(self._texts[index])
        choices = [self._choices[index] for index in sorted(self._choices)]
        return Generation(self._request_id, choices, self._usage)


def delta_of(response: pb.GenerateResponse) -> Delta:
    """A message of the stream."""
    return Delta(
        response.request_id,
        response.index,
        response.text,
        tuple(response.token_ids),
        _REASONS.get(response.finish_reason),
        _usage(response.usage) if response.HasField("usage") else None,
        _logprobs(response.logprobs),
        _logprobs(response.prompt_logprobs),
    )


def model_of(info: pb.ModelInfo) -> Model:
    """An entry of ListModels."""
    card = info.card
    return Model(
        card.name,
        card.context_len,
        tuple(card.modalities),
        info.num_workers,
        card.revision,
        card.created,
    )


def embeddings_of(response: pb.EmbedResponse) -> Embeddings:
    """An answer of Embed."""
    return Embeddings(
        tuple(tuple(_floats(one.vector)) for one in response.embeddings), _usage(response.usage)
    )


def _floats(data: bytes) -> array[float]:
    values = array("f", data)
    if array("I", [1]).tobytes()[0] == 0:
        values.byteswap()
    return values


def _usage(usage: types_pb2.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _logprobs(records: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(_logprob(record.chosen), tuple(map(_logprob, record.top)))
        for record in records
    )


def _logprob(entry: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(entry.token_id, entry.logprob, entry.text)
