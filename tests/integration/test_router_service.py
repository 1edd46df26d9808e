"""The router as gateways and workers meet it: real streams, real Valkey, real processes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace import blocks
from headrace.v1 import router_pb2, types_pb2
from services.router.app import App
from services.router.config import Config
from services.router.latency_model import Timing
from services.router.reservations import Reserved, WorkerKey
from tests.integration.router_parts import (
    BLOCK_SIZE,
    MODEL,
    FakeWorker,
    Gateway,
    RunningRouter,
    Valkey,
    WorkerProcess,
    free_port,
    prompt,
    until,
)

Update = router_pb2.ReservationUpdate


@pytest.fixture
def policy() -> str:
    return "kv"


@pytest.fixture
async def router(
    valkey: Valkey, workers: list[FakeWorker], policy: str
) -> AsyncIterator[RunningRouter]:
    router = await RunningRouter(valkey.url, policy).start()
    await until("both workers answer", lambda: router.reachable("one", "two"))
    yield router
    await router.close()


@pytest.fixture
async def gateway(router: RunningRouter) -> AsyncIterator[Gateway]:
    gateway = await Gateway(router).open()
    yield gateway
    gateway.stream.cancel()


async def hold(router: RunningRouter, worker: FakeWorker, packed: bytes) -> None:
    """The worker now holds these blocks, and the router knows."""
    publisher = worker.publisher
    await publisher.publish(stored=blocks.short_ids(packed))
    await until(
        "the blocks are known",
        lambda: router.owned(publisher.card.worker_id) == set(publisher.owned),
    )


def worker_of(plan: router_pb2.Plan) -> str:
    (leg,) = plan.legs
    assert leg.role == router_pb2.Leg.ROLE_COMPLETE
    return leg.worker.worker_id


def reserved(router: RunningRouter, worker_id: str, generation: int = 1) -> Reserved:
    return router.app.router.reservations.load(WorkerKey(worker_id, generation))


async def test_a_prefix_goes_to_its_owner(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    await hold(router, workers[1], prompt(600))
    for num_tokens, matched in ((600, 592), (592, 576), (900, 592), (20, 16)):
        plan = (await gateway.route(num_tokens, seed=0)).plan
        assert worker_of(plan) == "two"
        # The last token is always computed, so 592 tokens find 36 blocks, not 37.
        assert plan.matched_tokens == matched
        assert plan.policy == "kv"
        assert plan.legs[0].worker.address == workers[1].address
        assert plan.legs[0].worker.generation == 1
        assert plan.predicted_ttft_ms > 0
        await gateway.say(updates=[Update(id=gateway._last_id, event=Update.EVENT_RELEASED)])
    elsewhere = await gateway.route(600, seed=0, exclude_workers=["two"])
    assert worker_of(elsewhere.plan) == "one"
    assert elsewhere.plan.matched_tokens == 0


async def test_cold_prompts_spread(router: RunningRouter, gateway: Gateway) -> None:
    chosen = [worker_of((await gateway.route(600, seed=seed)).plan) for seed in range(1, 9)]
    assert chosen.count("one") == chosen.count("two") == 4


@pytest.mark.parametrize("policy", ["round_robin"])
async def test_round_robin_spreads(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    await hold(router, workers[0], prompt(600))
    chosen = [worker_of((await gateway.route(600)).plan) for _ in range(6)]
    # Where a router begins differs from router to router.
    assert chosen in (["one", "two"] * 3, ["two", "one"] * 3)
    assert (await router.fleet()).policy == "round_robin"


async def test_a_reservations_life(router: RunningRouter, gateway: Gateway) -> None:
    result = await gateway.route(600)
    worker = worker_of(result.plan)
    assert reserved(router, worker) == Reserved(600, 39, 1, 1)
    await gateway.say(updates=[Update(id=result.id, event=Update.EVENT_PREFILL_DONE)])
    await until("prefill done", lambda: reserved(router, worker) == Reserved(0, 39, 1, 1))
    await gateway.say(updates=[Update(id=result.id, event=Update.EVENT_RELEASED)])
    await until("released", lambda: reserved(router, worker) == Reserved())
    await router.select()
    assert len(router.app.router.reservations) == 0


async def test_a_cancel_that_crosses_the_answer_releases(
    router: RunningRouter, gateway: Gateway
) -> None:
    result = await gateway.route(600)
    await gateway.say(cancels=[result.id])
    await until("released", lambda: len(router.app.router.reservations) == 0)


async def test_reservations_die_with_the_stream_after_its_grace(
    router: RunningRouter, gateway: Gateway
) -> None:
    for seed in range(3):
        await gateway.route(600, seed=seed)
    gateway.stream.cancel()
    await until("they are gone", lambda: len(router.app.router.reservations) == 0)
    assert reserved(router, "one") == reserved(router, "two") == Reserved()


async def test_a_gateway_that_comes_back_keeps_what_it_announces(
    router: RunningRouter, gateway: Gateway
) -> None:
    first = await gateway.route(600, seed=1)
    await gateway.route(600, seed=2)
    gateway.stream.cancel()
    kept = router_pb2.Reservation(
        id=first.id, worker=first.plan.legs[0].worker, model=MODEL.name, blocks=38, num_sequences=1
    )
    again = await Gateway(router).open(kept)
    other = await Gateway(router, "another").open()
    await other.route(600, seed=3)
    other.stream.cancel()
    # Once the other's grace is over, so is that of the stream which was lost before it.
    await until("the other's is gone", lambda: len(router.app.router.reservations) == 1)
    assert reserved(router, worker_of(first.plan)) == Reserved(0, 38, 1, 1)
    again.stream.cancel()


async def test_the_fleet_comes_first_and_at_every_change(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    (model,) = gateway.fleets[0].models
    assert model.card.name == MODEL.name
    assert model.card.block_size == BLOCK_SIZE
    assert model.card.tokenizer_digest == MODEL.tokenizer_digest
    assert [(w.worker_id, w.address) for w in model.workers] == [
        ("one", workers[0].address),
        ("two", workers[1].address),
    ]
    await workers[0].stop_serving()
    assert [w.worker_id for w in (await gateway.read_fleet()).models[0].workers] == ["two"]
    await workers[0].serve()
    assert len((await gateway.read_fleet()).models[0].workers) == 2
    await workers[1].stop_renewing()
    await workers[1].publisher.depart()
    assert [w.worker_id for w in (await gateway.read_fleet()).models[0].workers] == ["one"]


async def test_a_draining_worker_is_not_chosen(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    workers[0].load.draining = True
    await until("it is out", lambda: router.reachable("two"))
    assert worker_of(await router.select()) == "two"


async def test_a_gateway_reports_a_failure(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    changes: list[bool] = []
    router.app.fleet.on_change.append(lambda: changes.append(router.reachable("two")))
    stale = router_pb2.WorkerFailure(worker_id="two", generation=99, reason="of another life")
    failure = router_pb2.WorkerFailure(worker_id="one", generation=1, reason="it resets me")
    await gateway.say(failures=[stale, failure])
    await until("it was out, and back with its next word", lambda: changes == [True, False])
    assert router.reachable("one", "two")


async def test_a_killed_worker_is_out_at_once(
    router: RunningRouter, valkey: Valkey, gateway: Gateway
) -> None:
    for end in (signal.SIGKILL, signal.SIGSTOP):
        worker = FakeWorker(valkey.url, f"zzz-{end.name}")
        process = WorkerProcess(worker.publisher.card.worker_id, worker.port)
        try:
            await worker.start(serve=False)
            name = worker.publisher.card.worker_id
            await until("it answers", lambda n=name: router.reachable("one", "two", n))
            await hold(router, worker, prompt(600, seed=5))
            assert worker_of((await gateway.route(600, seed=5)).plan) == name
            process.signal(end)
            await until("it is out", lambda: router.reachable("one", "two"))
            assert worker_of((await gateway.route(600, seed=5)).plan) != name
            # Its lease goes on: nobody but the health stream could have told.
            assert router.app.fleet.worker(MODEL.name, name) is not None
            if end is signal.SIGSTOP:
                process.signal(signal.SIGCONT)
                await until("it is back", lambda n=name: router.reachable("one", "two", n))
            await worker.stop_renewing()
            await worker.publisher.depart()
            await until("it left", lambda n=name: router.app.fleet.worker(MODEL.name, n) is None)
        finally:
            process.end()
            await worker.close()


async def test_a_worker_that_says_nothing_is_out(
    router: RunningRouter, workers: list[FakeWorker]
) -> None:
    # Its connection answers pings all the while, as that of a hung loop does.
    workers[0].servicer.silent = True
    await until("it is out", lambda: router.reachable("two"))
    workers[0].servicer.silent = False
    await until("it is back", lambda: router.reachable("one", "two"))


async def test_another_worker_at_the_address_is_no_answer(
    router: RunningRouter, workers: list[FakeWorker], caplog: pytest.LogCaptureFixture
) -> None:
    workers[0].servicer.message.worker.worker_id = "somebody"
    await until("it is out", lambda: router.reachable("two"))
    assert "'somebody' answers" in caplog.text


async def test_it_explains_a_choice_without_making_it(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    await hold(router, workers[1], prompt(600))
    await gateway.route(600, seed=4)
    workers[0].load.draining = True
    await until("it is out", lambda: router.reachable("two"))
    select = router_pb2.SelectWorkerRequest(
        model=MODEL.name, block_ids=prompt(610), num_tokens=610, num_sequences=1
    )
    explained = await router.stub.Explain(router_pb2.ExplainRequest(select=select), timeout=10)
    assert worker_of(explained.plan) == "two"
    one, two = explained.workers
    assert (one.worker.worker_id, one.eligible, two.eligible) == ("one", False, True)
    assert [(tier.tier, tier.blocks) for tier in two.leading] == [("device", 37)]
    assert (one.matched_tokens, two.matched_tokens) == (0, 37 * BLOCK_SIZE)
    assert one.prefill_tokens + two.prefill_tokens == 600
    assert two.predicted_ttft_ms == explained.plan.predicted_ttft_ms
    assert len(router.app.router.reservations) == 1
    assert (await router.fleet()).counters.decisions == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.stub.Explain(router_pb2.ExplainRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_what_it_knows_and_counted_is_visible(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    await hold(router, workers[1], prompt(600))
    await gateway.route(600, seed=0)
    await gateway.route(600, seed=1)
    await gateway.route(5, seed=1)
    await gateway.route(600, model="unknown")
    fleet = await router.fleet()
    assert fleet.router_id == router.app.router_id
    counters = fleet.counters
    assert (counters.decisions, counters.refused_decisions) == (3, 1)
    # A prompt without a full block can't match anything.
    assert counters.zero_matches == 1
    assert (counters.prompt_tokens, counters.matched_tokens) == (1205, 592)
    assert counters.resyncs == {"new": 2}
    assert counters.events == 1
    assert (fleet.index.blocks, fleet.redis_trouble) == (37, "")
    one, two = fleet.models[0].workers
    assert [(tier.tier, tier.blocks) for tier in two.tiers] == [("device", 37)]
    assert (one.event_lag, two.event_lag) == (0, 0)
    assert (one.last_resync_cause, one.resyncs) == ("new", 1)


async def test_load_and_timing_are_taken_from_the_workers_word(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    one, two = workers
    for load in (one.load, two.load):
        # A thousand steps of a thousand tokens.
        load.step_ms, load.prefill_steps = 500_000, 1000
        load.prefill_tokens, load.prefill_squares = 10**6, 10**9
    one.load.active_sequences = 3
    one.load.queued_prefill_tokens = 50_000
    fleet = router.app.fleet.models[MODEL.name]
    await until(
        "both are calibrated", lambda: all(w.latency.timing.calibrated for w in fleet.eligible)
    )
    plan = (await gateway.route(1000)).plan
    assert worker_of(plan) == "two"
    timing = fleet.workers["two"].latency.timing
    assert timing.prefill_ms(1000) > Timing().prefill_ms(1000)
    assert plan.predicted_ttft_ms == pytest.approx(timing.prefill_ms(1000), rel=0.2)
    states = (await router.fleet()).models[0].workers
    assert [s.active_sequences for s in states] == [3, 0]
    assert [s.reserved_prefill_tokens for s in states] == [0, 1000]


BAD = [
    ({"model": "unknown"}, 5, "model"),
    ({"block_ids": b"123"}, 3, "block_ids"),
    ({"block_ids": bytes(16 * 38)}, 3, "block_ids"),
    ({"num_tokens": 0}, 3, "num_tokens"),
    ({"exclude_workers": ["one", "two"]}, 14, ""),
]


@pytest.mark.parametrize(("fields", "code", "field"), BAD, ids=lambda v: str(v)[:20])
async def test_bad_calls_get_errors_of_their_own(
    router: RunningRouter, gateway: Gateway, fields: dict[str, Any], code: int, field: str
) -> None:
    num_tokens = fields.get("num_tokens", 600)
    fields = {name: value for name, value in fields.items() if name != "num_tokens"}
    result = await gateway.route(num_tokens, **fields)
    assert (result.error.code, result.error.field) == (code, field)
    if code == 5:
        assert MODEL.name in result.error.message
    if code == 14:
        assert result.error.retry_after_ms > 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.select(num_tokens, **fields)
    assert caught.value.code().value[0] == code
    assert len(router.app.router.reservations) == 0
    assert (await gateway.route(600)).HasField("plan")


async def test_a_known_model_without_a_worker_that_answers_is_unavailable(
    router: RunningRouter, workers: list[FakeWorker], gateway: Gateway
) -> None:
    for worker in workers:
        await worker.stop_serving()
    await until("both are out", lambda: router.reachable())
    result = await gateway.route(600)
    assert result.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert result.error.retry_after_ms > 0


@pytest.mark.parametrize(
    "first", [router_pb2.RouteRequest(), router_pb2.RouteRequest(open=router_pb2.RouteOpen())]
)
async def test_a_stream_must_open_with_a_gateways_id(
    router: RunningRouter, first: router_pb2.RouteRequest
) -> None:
    stream = router.stub.Route()
    await stream.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_long_prompt_in_chunks(router: RunningRouter, gateway: Gateway) -> None:
    select = router_pb2.SelectWorkerRequest(
        model=MODEL.name, block_ids=prompt(32_000), num_tokens=32_000, num_sequences=1
    )
    data = router_pb2.RouteCall(id=7, select=select).SerializeToString()
    half = len(data) // 2
    await gateway.say(chunks=[types_pb2.Chunk(id=7, data=data[:half])])
    await gateway.say(chunks=[types_pb2.Chunk(id=7, data=data[half:], last=True)])
    message = await gateway.stream.read()
    assert message.results[0].id == 7
    assert message.results[0].HasField("plan")


async def test_it_waits_for_redis_and_then_serves_an_empty_fleet() -> None:
    port = free_port()
    app = App(Config(listen="127.0.0.1:0", redis=f"redis://127.0.0.1:{port}/0"))
    await app.start()
    ready = asyncio.ensure_future(app.ready())
    valkey: Valkey | None = None
    try:
        async with grpc.aio.insecure_channel(app.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="headrace.v1.RouterService")
            answer = await health.Check(request)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            valkey = Valkey(port)
            await ready
            answer = await health.Check(request)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await app.close()
        if valkey is not None:
            valkey.stop()
