"""The gRPC edge's protos as our own types, and back; fields named as the client sent them.

What grows with every token is encoded in `response_bytes.py`. Nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.errors import HeadraceError, InvalidArgument
from headrace.rpc.convert import sampling_from_proto
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from services.gateway.generation import ChatMessage, GenerationRequest
from services.gateway.validation import MAX_NAME_LEN

if TYPE_CHECKING:
    from services.gateway.generation import ServedModel

_SAMPLING_FIELDS = frozenset(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_CHAT_FIELDS = frozenset(pb.Chat.DESCRIPTOR.fields_by_name)


def parse_request(
    request: pb.GenerateRequest, request_id: str, timeout_s: float | None
) -> GenerationRequest:
    """The request in our own terms; the pipeline checks the values. Raises InvalidArgument."""
    given = request.WhichOneof("input")
    if given is None:
        raise InvalidArgument("one of prompt, chat and token_ids must be given", field="prompt")
    if len(request.user) > MAX_NAME_LEN:
        raise InvalidArgument(
            f"user must have at most {MAX_NAME_LEN} characters, not {len(request.user)}",
            field="user",
        )
    chat = request.chat
    has = request.HasField
    continues = chat.continue_final_message
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continues
    return GenerationRequest(
        request_id=request_id,
        model=request.model,
        prompt=request.prompt if given == "prompt" else None,
        messages=tuple(map(_message, chat.messages)) if given == "chat" else None,
        token_ids=tuple(request.token_ids.ids) if given == "token_ids" else None,
        sampling=sampling_from_proto(request.sampling),
        n=request.n if has("n") else 1,
        stop=tuple(request.stop),
        timeout_s=timeout_s,
        priority=request.priority,
        session_id=request.session_id,
        tools_json=chat.tools_json,
        template_args_json=chat.template_args_json,
        add_generation_prompt=opens,
        continue_final_message=continues,
        add_special_tokens=request.add_special_tokens if has("add_special_tokens") else True,
        skip_special_tokens=request.skip_special_tokens if has("skip_special_tokens") else True,
        bad_words=tuple(request.bad_words),
    )


def _message(message: pb.Message) -> ChatMessage:
    return ChatMessage(message.role, message.content, message.message_json)


def with_client_s_field(error: HeadraceError, prefix: str = "") -> HeadraceError:
    """The error with its field's path from the client's message down, below `prefix`."""
    field = client_field(error.field)
    if field:
        error.field = f"{prefix}{field}"
    elif prefix:
        error.field = prefix.rstrip(".")
    return error


def client_field(field: str) -> str:
    """The path of a field of ours in a GenerateRequest."""
    name = field.partition("[")[0].partition(".")[0]
    if name in _SAMPLING_FIELDS:
        return f"sampling.{field}"
    if name in _CHAT_FIELDS:
        return f"chat.{field}"
    return "token_ids.ids" if field == "token_ids" else field


def model_info(model: ServedModel) -> pb.ModelInfo:
    """A served model as clients see it."""
    card = types_pb2.ModelCard(
        name=model.name,
        revision=model.revision,
        tokenizer_digest=model.tokenizer_digest,
        context_len=model.context_len,
        block_size=model.block_size,
        modalities=model.modalities,
        created=model.created,
    )
    return pb.ModelInfo(card=card, num_workers=model.num_workers)
