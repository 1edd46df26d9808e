"""The encoding by hand is protobuf's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.logprobs import TokenLogprobs, pack
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2
from services.gateway import response_bytes
from services.gateway.generation import Usage

U32 = st.integers(0, (1 << 32) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT, U32, TEXT, st.lists(U32))
def test_a_delta_is_encoded_as_protobuf_would(
    request_id: str, index: int, text: str, token_ids: list[int]
) -> None:
    prefix = response_bytes.prefix(request_id, index)
    ours = response_bytes.delta(prefix, text, token_ids)
    assert ours == response_bytes.plain(request_id, index, text, token_ids)


@given(TEXT, U32, st.integers(0, 300))
def test_so_is_what_stands_in_a_batch(text: str, token_id: int, number: int) -> None:
    response = response_bytes.delta(response_bytes.prefix("r", 1), text, [token_id])
    ours = response_bytes.in_batch(response_bytes.batch_prefix(number), response)
    assert (
        ours
        == pb.GenerateBatchResponse(
            request_index=number,
            response=pb.GenerateResponse(request_id="r", index=1, text=text, token_ids=[token_id]),
        ).SerializeToString()
    )


def test_the_rest_completes_a_message() -> None:
    data = pack([TokenLogprobs((7, -0.5), [(7, -0.5), (8, -1.5)])])
    scores = response_bytes.logprobs(data, 2, lambda token_id: b"<%d>" % token_id)
    message = response_bytes.delta(response_bytes.prefix("r", 0), "a", [7])
    message += response_bytes.rest(reason="stop", usage=Usage(3, 2, 1), logprobs=scores)
    response = pb.GenerateResponse.FromString(message)
    assert response.SerializeToString() == message
    assert (response.text, list(response.token_ids)) == ("a", [7])
    assert response.finish_reason == types_pb2.FINISH_REASON_STOP
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 2, 1)
    assert [(e.token_id, e.logprob, e.text) for e in response.logprobs[0].top] == [
        (7, -0.5, b"<7>"),
        (8, -1.5, b"<8>"),
    ]
