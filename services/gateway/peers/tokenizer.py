"""The tokenizer service, as the gateway sees it: text in, ids and block ids out.

One stream carries all calls. It waits through the service's restarts, within a
limit. It keeps no table and knows no worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import grpc

from headrace.blocks import ID_LEN, TOKEN_LEN, pack_tokens, unpack_tokens
from headrace.errors import DeadlineExceeded, Internal, Unavailable
from headrace.rpc.calls import CallClient, ClientCodec
from headrace.rpc.errors import from_rpc
from headrace.rpc.options import CHANNEL, MAX_CHUNKED_LEN
from headrace.v1 import tokenizer_pb2 as pb
from headrace.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from services.gateway.detokenizer import DetokenizerTable, TableContent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from headrace.registry import ModelCard
    from headrace.v1 import types_pb2
    from services.gateway.generation import GenerationRequest

_UNARY_TIMEOUT_S = 10.0
_REPLACES_EACH_BYTE = {
    pb.DetokenizerTable.KIND_BYTES: False,
    pb.DetokenizerTable.KIND_BYTE_FALLBACK: True,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt: token ids (u32 little-endian) and the ids of its full blocks, 16 bytes each."""

    token_ids: bytes
    block_ids: bytes
    tokenizer_digest: str

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // TOKEN_LEN


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer that the service has."""

    digest: str
    #: The chat template's source, that for tools if there are two; empty: none.
    chat_template: str


class TokenizerPeer:
    """One tokenizer service. `start` it inside the loop, `close` it at the end."""

    def __init__(self, address: str, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL)
        self._stub = TokenizerServiceStub(self._channel)
        self._name = f"tokenizer {address}"
        self._calls = CallClient(self._name, self._stub.Tokenize, _Codec())

    @property
    def connected(self) -> bool:
        return self._calls.connected

    def start(self) -> None:
        self._calls.start()

    async def close(self) -> None:
        await self._calls.close()
        await self._channel.close()

    async def encode(
        self,
        request: GenerationRequest,
        card: ModelCard,
        namespace_key: bytes,
        *,
        timeout_s: float,
        traceparent: str = "",
    ) -> Encoded:
        """The request's prompt as ids. `timeout_s` is what its deadline leaves.

        Raises the service's error, DeadlineExceeded, or Unavailable when no
        service answers for as long as this peer waits.
        """
        encode = _encode_request(request, card, namespace_key)
        call = pb.TokenizeCall(traceparent=traceparent, encode=encode)
        answer = (await self._call(call, timeout_s)).encode
        if not answer.token_ids or len(answer.block_ids) % ID_LEN:
            raise Internal
        return Encoded(answer.token_ids, answer.block_ids, answer.tokenizer_digest)

    async def render(
        self, request: GenerationRequest, model: str, *, timeout_s: float, traceparent: str = ""
    ) -> str:
        """The text that the model's template makes of the request's chat. Raises as `encode`."""
        call = pb.TokenizeCall(traceparent=traceparent)
        call.render_chat.model = model
        _fill_chat(call.render_chat.chat, request)
        return (await self._call(call, timeout_s)).render_chat.text

    async def encode_words(
        self, words: Sequence[str], model: str, *, timeout_s: float
    ) -> list[tuple[int, ...]]:
        """The ids of each of `words`, nothing put around them. Raises as `encode`."""
        call = pb.TokenizeCall()
        call.encode_batch.model = model
        call.encode_batch.texts.extend(word.encode() for word in words)
        call.encode_batch.skip_special_tokens = True
        answer = (await self._call(call, timeout_s)).encode_batch
        ids, counts = unpack_tokens(answer.token_ids), unpack_tokens(answer.counts)
        if len(counts) != len(words) or sum(counts) != len(ids):
            raise Internal
        ends = list(accumulate(counts))
        return [tuple(ids[end - n : end]) for end, n in zip(ends, counts, strict=True)]

    async def _call(self, call: pb.TokenizeCall, timeout_s: float) -> pb.TokenizeResult:
        limit_s = min(self._timeout_s, timeout_s)
        call.id = self._calls.next_id()
        call.timeout_ms = max(1, int(limit_s * 1000))
        try:
            return await self._calls.call(call, timeout_s=limit_s)
        except DeadlineExceeded as error:
            if limit_s < timeout_s:
                raise Unavailable(error.message, retry_after_ms=1000) from error
            raise

    async def loaded(self) -> dict[str, LoadedTokenizer]:
        """What the service has, by model. Raises a HeadraceError."""
        try:
            answer = await self._stub.ListTokenizers(
                pb.ListTokenizersRequest(), timeout=_UNARY_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._name) from error
        return {
            entry.model: LoadedTokenizer(entry.tokenizer_digest, entry.chat_template)
            for entry in answer.tokenizers
        }

    async def table(self, model: str) -> DetokenizerTable:
        """How `model`'s tokens become text. Raises a HeadraceError, or ValueError for nonsense."""
        pieces: list[bytes] = []
        length = 0
        request = pb.GetDetokenizerTableRequest(model=model)
        try:
            async for piece in self._stub.GetDetokenizerTable(request, timeout=_UNARY_TIMEOUT_S):
                pieces.append(piece.data)
                length += len(piece.data)
                if length > MAX_CHUNKED_LEN:
                    raise ValueError(f"{model}'s table is longer than {MAX_CHUNKED_LEN} bytes")
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, self._name) from error
        return await DetokenizerTable.load(_table_content(model, b"".join(pieces)))


def _encode_request(
    request: GenerationRequest, card: ModelCard, namespace_key: bytes
) -> pb.EncodeRequest:
    encode = pb.EncodeRequest(
        model=card.name,
        namespace_key=namespace_key,
        block_size=card.block_size,
        max_tokens=card.context_len,
    )
    if request.messages is not None:
        _fill_chat(encode.chat, request)
    elif request.token_ids is not None:
        encode.token_ids = pack_tokens(request.token_ids)
    else:
        encode.text = request.prompt or ""
        encode.skip_special_tokens = not request.add_special_tokens
    return encode


def _fill_chat(chat: pb.ChatTemplateInput, request: GenerationRequest) -> None:
    chat.add_generation_prompt = request.add_generation_prompt
    if request.tools_json:
        chat.tools_json = request.tools_json.encode()
    if request.template_args_json:
        chat.template_args_json = request.template_args_json.encode()
    for message in request.messages or ():
        if message.message_json:
            chat.messages.add(message_json=message.message_json.encode())
        else:
            chat.messages.add(role=message.role, content=message.content)


def _table_content(model: str, data: bytes) -> TableContent:
    table = pb.DetokenizerTable.FromString(data)
    if table.kind not in _REPLACES_EACH_BYTE:
        raise ValueError(f"{model}'s detokenizer table is of a kind unknown here: {table.kind}")
    return TableContent(
        table.tokenizer_digest,
        table.data,
        table.lengths,
        table.special,
        table.eos_token_ids,
        replaces_each_byte=_REPLACES_EACH_BYTE[table.kind],
        strips_first_space=table.strips_first_space,
        first_ids=table.first_ids,
        first_data=table.first_data,
        first_lengths=table.first_lengths,
    )


class _Codec(
    ClientCodec[pb.TokenizeRequest, pb.TokenizeResponse, pb.TokenizeCall, pb.TokenizeResult]
):
    def open(self) -> None:
        return None

    def has_more(self) -> bool:
        return False

    def request(
        self, calls: list[pb.TokenizeCall], chunks: list[types_pb2.Chunk], cancels: list[int]
    ) -> pb.TokenizeRequest:
        return pb.TokenizeRequest(calls=calls, chunks=chunks, cancels=cancels)

    def results(
        self, response: pb.TokenizeResponse
    ) -> tuple[Iterable[pb.TokenizeResult], Sequence[types_pb2.Chunk]]:
        return response.results, response.chunks

    def parse_result(self, data: bytes) -> pb.TokenizeResult:
        return pb.TokenizeResult.FromString(data)
