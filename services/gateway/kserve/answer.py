"""From what a request's sequences produced to the tensors of its responses. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.gateway.kserve.convert import InferResponse
from services.gateway.kserve.options import EXTRA_OUTPUTS, TEXT_OUTPUT, VERSION
from services.gateway.kserve.tensors import BYTES, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.gateway.kserve.options import TextRequest
    from services.gateway.kserve.sink import InferSink, Output

#: Triton's word that no response of the request comes any more.
FINAL = "triton_final_response"


def responses_of(sink: InferSink) -> list[InferResponse]:
    """What the client gets now of a request that has not failed: one response, or none; for
    a request that asks for it, another, empty one at its end."""
    request, is_last = sink.request, sink.is_over
    outputs = sink.take()
    apart = is_last and request.empty_final_response
    responses = []
    if is_last or any(output.text or output.num_tokens for output in outputs):
        tensors = _tensors(sink, outputs)
        responses.append(_response(request, tensors, is_final=is_last and not apart))
    if apart:
        responses.append(_response(request, (), is_final=True))
    return responses


def failure_of(model: str, request_id: str) -> InferResponse:
    """What goes beside an error's text on a stream: whose error it is, and that it is over."""
    return InferResponse(model, VERSION, request_id, (), {FINAL: True})


def _response(request: TextRequest, tensors: Sequence[Tensor], *, is_final: bool) -> InferResponse:
    return InferResponse(request.generation.model, VERSION, request.id, tensors, {FINAL: is_final})


def _tensors(sink: InferSink, outputs: list[Output]) -> list[Tensor]:
    request, count = sink.request, len(outputs)
    before = request.generation.prompt or "" if request.echo else ""
    texts = tuple((before + "".join(output.text)).encode() for output in outputs)
    tensors = [Tensor(TEXT_OUTPUT, BYTES, (count,), texts)]
    for name in EXTRA_OUTPUTS:
        if name not in request.outputs:
            continue
        if name == "finish_reason":
            reasons = tuple((output.reason or "").encode() for output in outputs)
            tensors.append(Tensor(name, BYTES, (count,), reasons))
        elif name == "num_output_tokens":
            numbers = tuple(output.num_tokens for output in outputs)
            tensors.append(Tensor(name, "UINT32", (count,), numbers))
        elif sink.usage is not None:
            # Known at the end alone.
            tensors.append(Tensor(name, "UINT32", (1,), (sink.usage.prompt_tokens,)))
    return tensors
