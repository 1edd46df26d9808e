"""What the edges (gRPC, HTTP) and the pipeline owe each other.

An edge parses a client's request into a `GenerationRequest`, hands it to
`Pipeline.start` with a `Sink`, and is called back as tokens come. Nothing here
knows a transport.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from headrace.params import SamplingParams

if TYPE_CHECKING:
    from headrace.errors import HeadraceError
    from headrace.telemetry import Span
    from services.gateway.parsers import AnswerFormat

EndReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn."""

    role: str
    content: str
    #: The whole message as a JSON object, for one with more than role and content (tool
    #: calls, a name, reasoning); the template then sees this, and nothing of the other two.
    message_json: str = ""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What generated text must be: JSON, or JSON that fits `schema_json`."""

    kind: Literal["json_object", "json_schema"]
    schema_json: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, validated: exactly one of prompt, messages and token_ids is given."""

    request_id: str
    model: str
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    stop: tuple[str, ...] = ()
    #: Seconds from now; None: the gateway's own limit.
    timeout_s: float | None = None
    tenant: str = ""
    priority: int = 0
    session_id: str = ""
    #: JSON array of tool definitions, as the template's `tools`; empty: none.
    tools_json: str = ""
    #: JSON object of further template variables; empty: none.
    template_args_json: str = ""
    #: Whether the template opens the answer's turn.
    add_generation_prompt: bool = True
    #: Whether the last message is left open, for the answer to go on with it.
    continue_final_message: bool = False
    #: How the answer to a chat begins, whatever the model would say; not part of its text.
    answer_prefix: str = ""
    #: Whether a plain prompt gets the special tokens that the model puts around text.
    add_special_tokens: bool = True
    #: Whether special tokens are left out of the text.
    skip_special_tokens: bool = True
    #: Words that must not be generated, wherever they stand.
    bad_words: tuple[str, ...] = ()
    #: None: free text.
    output_format: OutputFormat | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the whole request, all its sequences together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Sink(Protocol):
    """Where one request's output goes.

    Called from the reader of a worker's frame, many sinks in one loop turn: a
    method must neither block, nor await, nor raise. After `on_done` or
    `on_error` nothing more comes.
    """

    def on_delta(self, index: int, text: str, token_ids: list[int], logprobs: bytes = b"") -> None:
        """Sequence `index` grew. `text` never ends inside a character; it may be empty.

        `logprobs` has a record for each of `token_ids`, if the request asks for them
        (see headrace.logprobs)."""

    def on_prompt_logprobs(self, index: int, data: bytes) -> None:
        """The next records of the prompt's tokens, if the request asks for them; all come
        before the sequence's first token."""

    def on_end(self, index: int, reason: EndReason) -> None:
        """Sequence `index` is complete."""

    def on_done(self, usage: Usage) -> None:
        """All sequences are complete."""

    def on_error(self, error: HeadraceError) -> None:
        """The request failed, at any time."""


class Vocabulary(Protocol):
    """The tokens of a model's tokenizer."""

    def spelled(self, token_id: int) -> bytes:
        """The token's bytes, a special token's as it is written; empty if there is none."""


class Generation(Protocol):
    """A request on its way."""

    @property
    def prompt_ids(self) -> bytes:
        """The prompt's tokens, u32 little-endian."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the model that works on it."""

    def cancel(self) -> None:
        """Stop it: the engine stops within one step, and the sink hears nothing more.
        Safe to call at any time, more than once."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as clients see it."""

    name: str
    created: int
    context_len: int
    num_workers: int
    revision: str
    tokenizer_digest: str
    block_size: int
    modalities: tuple[str, ...]


class Pipeline(Protocol):
    """The way of a request through tokenizer, router and worker."""

    async def start(self, request: GenerationRequest, sink: Sink, span: Span) -> Generation:
        """Tokenize, route and submit; returns once the request is on a worker.

        Raises a HeadraceError if it is refused before that (the sink then hears
        nothing). `span` is the edge's span; stages become its children. If the
        caller is cancelled while it waits, nothing is left behind.
        """

    def models(self) -> list[ServedModel]:
        """What is served now."""

    def answer_format(self, model: str) -> AnswerFormat:
        """How `model` writes tool calls and reasoning. Raises NotFound or Unavailable."""

    def check_serves(self, model: str, modality: str) -> None:
        """Raises NotFound, Unavailable, or InvalidArgument if the model is of another kind."""

    def is_ready(self) -> bool:
        """Whether a request could be served now."""
