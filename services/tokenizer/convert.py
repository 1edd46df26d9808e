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
        render = call.render_chat
        return "tokenizer.render_chat", work.Render(render.model, _chat(render.chat))
    if kind == "encode_batch":
        batch = call.encode_batch
        options = work.EncodeOptions(
            max_tokens=batch.max_tokens,
            skip_special_tokens=batch.skip_special_tokens,
            truncate=batch.truncate,
        )
        item = work.EncodeBatch(batch.model, list(batch.texts), options)
        return "tokenizer.encode_batch", item
    raise InvalidArgument("the call holds no work", field="work")


def result_of(call_id: int, answer: work.Answer) -> pb.TokenizeResult:
    """The result of a call that was answered with `answer`."""
    match answer:
        case work.Encoded():
            encode = pb.EncodeResponse(
                token_ids=answer.token_ids,
                block_ids=answer.block_ids,
                tokenizer_digest=answer.tokenizer_digest,
                offsets=answer.offsets,
            )
            return pb.TokenizeResult(id=call_id, encode=encode)
        case work.EncodedBatch():
            batch = pb.EncodeBatchResponse(
                token_ids=answer.token_ids,
                counts=answer.counts,
                tokenizer_digest=answer.tokenizer_digest,
            )
            return pb.TokenizeResult(id=call_id, encode_batch=batch)
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
        kind=(
            pb.DetokenizerTable.KIND_BYTE_FALLBACK
            if answer.replaces_each_byte
            else pb.DetokenizerTable.KIND_BYTES
        ),
        data=answer.data,
        lengths=answer.lengths,
        special=answer.special,
        eos_token_ids=answer.eos_token_ids,
        strips_first_space=answer.strips_first_space,
        first_ids=answer.first_ids,
        first_data=answer.first_data,
        first_lengths=answer.first_lengths,
    ).SerializeToString()


def info_of(info: work.Info) -> pb.TokenizerInfo:
    """One tokenizer, as others may know it."""
    return pb.TokenizerInfo(
        model=info.model,
        tokenizer_digest=info.tokenizer_digest,
        vocab_size=info.vocab_size,
        has_chat_template=info.has_chat_template,
        truncation_side=info.truncation_side,
        padding_side=info.padding_side,
        pad_token_id=info.pad_id,
        chat_template=info.chat_template,
    )


def _encoding_of(request: pb.EncodeRequest) -> work.Work:
    options = work.EncodeOptions(
        namespace_key=request.namespace_key,
        block_size=request.block_size,
        max_tokens=request.max_tokens,
        skip_special_tokens=request.skip_special_tokens,
        truncate=request.truncate,
        with_offsets=request.with_offsets,
    )
    kind = request.WhichOneof("input")
    if kind == "text":
        return work.EncodeText(request.model, request.text, options)
    if kind == "text_utf8":
        return work.EncodeUtf8(request.model, request.text_utf8, options)
    if kind == "chat":
        return work.EncodeChat(request.model, _chat(request.chat), options)
    if kind == "token_ids":
        return work.EncodeIds(request.model, request.token_ids, options)
    raise InvalidArgument("the request has no text, chat or token_ids", field="input")


def _chat(chat: pb.ChatTemplateInput) -> work.Chat:
    return work.Chat(
        [work.Message(m.role, m.content, m.message_json) for m in chat.messages],
        chat.add_generation_prompt,
        chat.tools_json,
        chat.template_args_json,
    )
