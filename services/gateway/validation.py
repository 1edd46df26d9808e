"""What a request must be, whichever edge it came from, before anyone works for it.

Pure: it sees the request and the model's limits, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument
from headrace.params import MAX_BAD_TOKEN_SEQUENCES, MAX_SEQUENCES, MAX_STOP_STRINGS

if TYPE_CHECKING:
    from headrace.registry import ModelCard
    from services.gateway.generation import GenerationRequest, OutputFormat

#: Characters of a stop string.
MAX_STOP_LEN = 256
#: Bytes of a role, of a tenant's or a session's name.
MAX_NAME_LEN = 256
#: Above and below the usual, which is 0.
MAX_PRIORITY = 100
#: Each may become two token sequences.
MAX_BAD_WORDS = MAX_BAD_TOKEN_SEQUENCES // 2


def check_request(request: GenerationRequest) -> None:
    """Raises InvalidArgument naming the field, the limit and the value."""
    if not request.model:
        raise InvalidArgument("model must be named", field="model")
    inputs = (request.prompt, request.messages, request.token_ids)
    if sum(given is not None for given in inputs) != 1:
        raise InvalidArgument(
            "exactly one of prompt, messages and token_ids must be given", field="prompt"
        )
    if request.prompt == "":
        raise InvalidArgument("prompt must not be empty", field="prompt")
    if request.token_ids == ():
        raise InvalidArgument("token_ids must not be empty", field="token_ids")
    _check_messages(request)
    if not 1 <= request.n <= MAX_SEQUENCES:
        raise InvalidArgument(f"n must be 1 to {MAX_SEQUENCES}, not {request.n}", field="n")
    _check_stops(request)
    _check_extras(request)
    if request.timeout_s is not None and request.timeout_s <= 0:
        raise InvalidArgument(
            f"the timeout must be more than 0 s, not {request.timeout_s:g}", field="timeout"
        )
    for field in ("tenant", "session_id"):
        if len(getattr(request, field)) > MAX_NAME_LEN:
            raise InvalidArgument(f"{field} is longer than {MAX_NAME_LEN} bytes", field=field)
    request.sampling.validate()


def _check_messages(request: GenerationRequest) -> None:
    if request.messages is None:
        return
    if not request.messages:
        raise InvalidArgument("messages must not be empty", field="messages")
    for index, message in enumerate(request.messages):
        if message.message_json:
            continue
        if not message.role or len(message.role) > MAX_NAME_LEN:
            raise InvalidArgument(
                f"messages[{index}].role must have 1 to {MAX_NAME_LEN} characters",
                field=f"messages[{index}].role",
            )


def _check_stops(request: GenerationRequest) -> None:
    if len(request.stop) > MAX_STOP_STRINGS:
        raise InvalidArgument(
            f"stop must hold at most {MAX_STOP_STRINGS} strings, not {len(request.stop)}",
            field="stop",
        )
    for index, stop in enumerate(request.stop):
        if not 1 <= len(stop) <= MAX_STOP_LEN:
            raise InvalidArgument(
                f"stop[{index}] must have 1 to {MAX_STOP_LEN} characters, not {len(stop)}",
                field=f"stop[{index}]",
            )


def _check_extras(request: GenerationRequest) -> None:
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidArgument(
            "continue_final_message and add_generation_prompt exclude each other",
            field="continue_final_message",
        )
    if len(request.bad_words) > MAX_BAD_WORDS:
        raise InvalidArgument(
            f"bad_words must hold at most {MAX_BAD_WORDS} words, not {len(request.bad_words)}",
            field="bad_words",
        )
    for index, word in enumerate(request.bad_words):
        if not 1 <= len(word) <= MAX_STOP_LEN:
            raise InvalidArgument(
                f"bad_words[{index}] must have 1 to {MAX_STOP_LEN} characters, not {len(word)}",
                field=f"bad_words[{index}]",
            )
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidArgument(
            f"priority must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}], not {request.priority}",
            field="priority",
        )


def check_output_format(output_format: OutputFormat | None, card: ModelCard) -> None:
    """Raises InvalidArgument for a format that the model's workers can't hold to."""
    if output_format is not None:
        raise InvalidArgument(
            f"response_format {output_format.kind} is not supported by the workers of "
            f"{card.name!r}: leave it out",
            field="response_format",
        )


def check_prompt_len(num_tokens: int, context_len: int) -> None:
    """Raises InvalidArgument unless the prompt leaves room for a token."""
    if num_tokens >= context_len:
        raise InvalidArgument(
            f"the prompt has {num_tokens} tokens, but the model's context is {context_len} tokens "
            "and must hold at least one generated token too",
            field="prompt",
        )


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises InvalidArgument for an id that the tokenizer does not have."""
    worst = max(token_ids)
    if min(token_ids) < 0 or worst >= vocab_size:
        wrong = worst if worst >= vocab_size else min(token_ids)
        raise InvalidArgument(
            f"token_ids must be below {vocab_size}, not {wrong}", field="token_ids"
        )
