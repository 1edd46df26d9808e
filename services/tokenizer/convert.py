"""Wire messages to work, and answers to wire messages."""

from __future__ import annotations

from headrace.errors import InvalidArgument
from headrace.v1 import tokenizer_pb2 as pb
from services.tokenizer import work


def task_of(call: pb.TokenizeCall) -> tuple[str, work.Work]:
    """The name of a call's span, and its work. Raises InvalidArgument if it holds none."""
    kind = call.WhichOneof("work")
    if kind == "encode":
        return "tokenizer.encode", _encoding_of(call.encode)
    if kind == "decode":
        decode = call.decode
        return "tokenizer.decode", work.Decode(
            decode.model, decode.token_ids, decode.skip_special_tokens
        )
    if kind == "render_chat":
        model, chat = call.render_chat.model, call.render_chat.chat
        return "tokenizer.render_chat", work.Render(
            model, _messages(chat), chat.add_generation_prompt
        )
    raise InvalidArgument("the call holds no work", field="work")


def result_of(call_id: int, answer: work.Answer) -> pb.TokenizeResult:
    """The result of a call that was answered with `answer`."""
    match answer:
        case work.Encoded(token_ids=token_ids, block_ids=block_ids, tokenizer_digest=digest):
            encode = pb.EncodeResponse(
                token_ids=token_ids, block_ids=block_ids, tokenizer_digest=digest
            )
            return pb.TokenizeResult(id=call_id, encode=encode)
        case work.Decoded(text=text):
            return pb.TokenizeResult(id=call_id, decode=pb.DecodeResponse(text=text))
        case work.Rendered(text=text):
            return pb.TokenizeResult(id=call_id, render_chat=pb.RenderChatResponse(text=text))
    raise TypeError(f"{type(answer).__name__} answers no call")


def table_of(answer: work.Answer) -> bytes:
    """A serialized DetokenizerTable."""
    if not isinstance(answer, work.Table):
        raise TypeError(f"{type(answer).__name__} is no table")
    return pb.DetokenizerTable(
        tokenizer_digest=answer.tokenizer_digest,
        kind=pb.DetokenizerTable.KIND_BYTES,
        data=answer.data,
        lengths=answer.lengths,
        special=answer.special,
        eos_token_ids=answer.eos_token_ids,
    ).SerializeToString()


def _encoding_of(request: pb.EncodeRequest) -> work.Work:
    options = work.EncodeOptions(
        request.namespace_key,
        request.block_size,
        request.max_tokens,
        request.skip_special_tokens,
    )
    kind = request.WhichOneof("input")
    if kind == "text":
        return work.EncodeText(request.model, request.text, options)
    if kind == "chat":
        messages = _messages(request.chat)
        add_prompt = request.chat.add_generation_prompt
        return work.EncodeChat(request.model, messages, add_prompt, options)
    if kind == "token_ids":
        return work.EncodeIds(request.model, request.token_ids, options)
    raise InvalidArgument("the request has no text, chat or token_ids", field="input")


def _messages(chat: pb.ChatTemplateInput) -> list[work.Message]:
    return [work.Message(message.role, message.content) for message in chat.messages]
