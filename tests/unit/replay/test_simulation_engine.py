"""A replay's core does what the engine core does step by step, to the bit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.params import SamplingParams
from services.replay.simulation_content import NAMESPACE, Content, Tokens
from services.replay.simulation_engine import ReplayCore
from services.replay.workload import TraceRequest
from services.worker.engine import EngineInfo, EngineStats, SequenceEnd, SequenceRequest
from services.worker.engines.sim.clock import VirtualClock
from services.worker.engines.sim.timing.polynomial import Polynomial

if TYPE_CHECKING:
    from services.worker.engine import StepOutput

PIECE_LEN = 4


class PlainCore(ReplayCore):
    """The twin: every step is `EngineCore.step`."""

    def _try_steady(self, output: StepOutput) -> None:
        pass


@dataclass(frozen=True)
class Arrival:
    """A request at a time, resumed behind `generated` tokens, cancelled a while later or never."""

    at: float
    request: TraceRequest
    generated: int
    cancel_after: float | None


@dataclass
class Record:
    """What came out: by step its end, who got tokens, ends, and changes of the cache."""

    steps: list[tuple[float, list[int], list[SequenceEnd], list[int], list[int]]] = field(
        default_factory=list
    )
    stats: dict[int, EngineStats] = field(default_factory=dict)
    num_steady: int = 0
    num_preempted: int = 0
    #: By step, what changed in slower tiers.
    slower: dict[int, dict[str, tuple[list[int], list[int]]]] = field(default_factory=dict)


def engine(core: type[ReplayCore], clock: VirtualClock, **sizes: int) -> ReplayCore:
    tier_blocks = tuple(size for size in (sizes["host"], sizes["disk"]) if size)
    info = EngineInfo(
        engine="sim", model_revision="", tokenizer_digest="", vocab_size=1 << 32,
        context_len=10_000, block_size=sizes["block_size"], total_blocks=sizes["num_blocks"],
        max_sequences=sizes["max_sequences"], eos_token_ids=(), resume="exact",
        tiers=("device", "host", "disk")[: 1 + len(tier_blocks)], tier_blocks=tier_blocks,
        tier_ms_per_block=(0.0, 0.7, 3.0)[: 1 + len(tier_blocks)],
    )  # fmt: skip
    return core(
        info, Polynomial(), clock,
        max_step_tokens=sizes["max_sequences"] + sizes["spare"],
        max_sequences=sizes["max_sequences"],
    )  # fmt: skip


def drive(
    kind: type[ReplayCore], arrivals: list[Arrival], stop_every: float, **sizes: int
) -> Record:
    """Everything to its end, as a worker does it: commands are taken between steps."""
    clock = VirtualClock()
    core = engine(kind, clock, **sizes)
    record = Record()
    todo: list[tuple[float, int, Arrival | None]] = []
    for number, arrival in enumerate(arrivals):
        todo.append((arrival.at, number, arrival))
        if arrival.cancel_after is not None:
            todo.append((arrival.at + arrival.cancel_after, number, None))
    todo.sort(key=lambda item: item[:2])
    while todo or core.has_work():
        if not core.has_work():
            clock.wait_until(todo[0][0])
        while todo and todo[0][0] <= clock.now():
            _, number, arrival = todo.pop(0)
            if arrival is None:
                core.cancel([number])
            else:
                core.submit([sequence(number, arrival, sizes["block_size"])])
        if not core.has_work():
            continue
        times = core.plan(clock.now() + stop_every) if core.is_steady else []
        if times:
            if todo:
                del times[bisect_left(times, todo[0][0]) + 1 :]
            steady(core, times, record)
        else:
            output = core.step()
            core.check()
            note(record, len(record.steps), output)
            record.steps.append(
                (clock.now(), output.sequence_ids, output.ends, output.stored, output.removed)
            )
        record.stats[len(record.steps)] = core.stats()
    core.check()
    assert core.stats().used_blocks == 0
    for tier, ids in core.owned_slower().items():
        found: set[int] = set()
        for changes in record.slower.values():
            stored, removed = changes.get(tier, ([], []))
            found = (found - set(removed)) | set(stored)
        assert found == set(ids)
    record.num_preempted = core.num_preemptions
    return record


def steady(core: ReplayCore, times: list[float], record: Record) -> None:
    running = core.running_ids()
    output = core.commit(times)
    record.num_steady += len(times)
    record.steps += [(time, running, [], [], []) for time in times[:-1]]
    ends, stored, removed = (
        (output.ends, output.stored, output.removed) if output is not None else ([], [], [])
    )
    record.steps.append((times[-1], running, ends, stored, removed))
    if output is not None:
        note(record, len(record.steps) - 1, output)


def note(record: Record, step: int, output: StepOutput) -> None:
    if output.slower:
        record.slower[step] = output.slower


def sequence(number: int, arrival: Arrival, block_size: int) -> SequenceRequest:
    request = arrival.request
    content = Content(request, number, PIECE_LEN, block_size)
    return SequenceRequest(
        sequence_id=number,
        prompt_ids=Tokens(content, request.num_tokens),  # type: ignore[arg-type]
        generated_ids=[0] * min(arrival.generated, request.output_tokens),
        sampling=SamplingParams(max_tokens=request.output_tokens, ignore_eos=True),
        namespace_key=NAMESPACE,
        priority=request.priority,
        tenant=request.tenant,
        timeout_ms=request.timeout_ms,
    )


REQUESTS = st.builds(
    TraceRequest,
    arrival_ms=st.just(0.0),
    num_tokens=st.integers(1, 40),
    output_tokens=st.integers(1, 60),
    hash_ids=st.lists(st.integers(0, 1), max_size=8).map(tuple),
    tenant=st.sampled_from(["", "other"]),
    priority=st.integers(0, 1),
    timeout_ms=st.sampled_from([0, 20, 500]),
)
ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at=st.floats(0, 2).map(lambda at: round(at, 4)),
        request=REQUESTS,
        generated=st.sampled_from([0, 0, 0, 5]),
        cancel_after=st.none() | st.floats(0.001, 0.5),
    ),
    min_size=1,
    max_size=12,
)

SEEN = {"steady": 0, "plain": 0, "preempted": 0, "slower": 0}


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arrivals=ARRIVALS,
    stop_every=st.sampled_from([0.0, 0.02, 1.0]),
    num_blocks=st.integers(2, 40),
    block_size=st.integers(1, 6),
    max_sequences=st.integers(1, 6),
    spare=st.integers(0, 20),
    host=st.sampled_from([0, 1, 6, 40]),
    disk=st.sampled_from([0, 3, 40]),
)
def check(arrivals: list[Arrival], stop_every: float, **sizes: int) -> None:
    fast = drive(ReplayCore, arrivals, stop_every, **sizes)
    plain = drive(PlainCore, arrivals, stop_every, **sizes)
    assert fast.steps == plain.steps
    assert fast.slower == plain.slower
    for step, stats in fast.stats.items():
        assert stats == plain.stats[step]
    assert not plain.num_steady
    SEEN["steady"] += fast.num_steady
    SEEN["plain"] += len(plain.steps)
    SEEN["preempted"] += fast.num_preempted
    SEEN["slower"] += len(fast.slower)


def test_hurrying_changes_nothing() -> None:
    SEEN.update(steady=0, plain=0, preempted=0, slower=0)
    check()
    # Else the examples would prove little.
    assert SEEN["steady"] > SEEN["plain"] / 3
    assert SEEN["preempted"]
    assert SEEN["slower"]
