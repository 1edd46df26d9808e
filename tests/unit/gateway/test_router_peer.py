"""The router comes and goes; requests do not notice."""

from __future__ import annotations

from typing import Any

from opentelemetry.trace import INVALID_SPAN

from headrace.params import SamplingParams
from services.gateway.generation import GenerationRequest
from services.gateway.ids import new_request_id


async def start(mesh: Any, max_tokens: int = 10) -> Any:
    sink = mesh.new_sink()
    request = GenerationRequest(
        new_request_id(), "bytes", prompt="hello", sampling=SamplingParams(max_tokens=max_tokens)
    )
    sink.generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    return sink


async def test_without_a_router_the_gateway_chooses_by_its_own_counts(
    mesh: Any, caplog: Any
) -> None:
    caplog.set_level("INFO", logger="headrace.gateway")
    await mesh.start(num_workers=3)
    router = mesh.pipeline._router
    await mesh.stop_router()
    await mesh.eventually(lambda: not router.connected)
    for worker in mesh.workers:
        worker.allowance = 1
    sinks = [await start(mesh) for _ in range(6)]
    await mesh.eventually(lambda: all(sink.texts for sink in sinks))
    assert [len(worker.submissions) for worker in mesh.workers] == [2, 2, 2]
    assert router.num_fallbacks == 6
    assert caplog.text.count("falling back") == 1
    assert mesh.pipeline.is_ready()
    # A worker found dead is not chosen, router or not.
    for worker in mesh.workers:
        worker.allowance = 1000
    await mesh.workers[0].kill()
    await mesh.eventually(lambda: all(sink.is_over for sink in sinks))
    assert [sink.error for sink in sinks] == [None] * 6
    again = await start(mesh)
    await mesh.eventually(lambda: again.is_over)
    assert again.texts == {0: "abcdefghij"}
    # The router returns, is told of the dead, and asked again.
    opens = len(mesh.router.opens)
    await mesh.start_router()
    await mesh.eventually(lambda: len(mesh.router.opens) > opens and router.connected)
    await mesh.eventually(lambda: [f.worker_id for f in mesh.router.failures] == ["w0"])
    fallbacks = router.num_fallbacks
    last = await start(mesh)
    await mesh.eventually(lambda: last.is_over)
    assert router.num_fallbacks == fallbacks
    assert "answers again" in caplog.text


async def test_what_is_in_flight_is_announced_to_a_new_router(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].allowance = 2
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.texts and mesh.router.prefilled)
    assert [list(opening.reservations) for opening in mesh.router.opens] == [[]]
    await mesh.stop_router()
    await mesh.start_router()
    await mesh.eventually(lambda: len(mesh.router.opens) == 2)
    (reservation,) = mesh.router.opens[1].reservations
    assert reservation.id == mesh.router.calls[0].id
    assert reservation.worker == mesh.workers[0].ref
    assert (reservation.model, reservation.prefill_tokens) == ("bytes", 0)
    assert (reservation.blocks, reservation.num_sequences) == (2, 1)
    mesh.workers[0].allowance = 100
    await mesh.eventually(lambda: sink.is_over)
    await mesh.eventually(lambda: mesh.router.released == [reservation.id])


async def test_a_router_that_does_not_answer_is_not_waited_for_long(mesh: Any) -> None:
    await mesh.start(num_workers=1, route_timeout_s=0.2)
    router = mesh.pipeline._router
    mesh.router.answers.clear()
    sink = await start(mesh)
    await mesh.eventually(lambda: sink.is_over)
    assert sink.texts == {0: "abcdefghij"}
    assert router.num_fallbacks == 1
    # The router may have reserved for the call that was given up.
    await mesh.eventually(lambda: mesh.router.calls[0].id in mesh.router.released)
    mesh.router.answers.set()
