"""A tiny engine: the real core over the sim runner, in virtual time."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from headrace.params import SamplingParams
from services.worker.engine import EngineInfo, SequenceRequest
from services.worker.engine_core import EngineCore
from services.worker.engines.sim.clock import VirtualClock
from services.worker.engines.sim.runner import SimRunner
from services.worker.engines.sim.timing.linear import Linear
from services.worker.engines.sim.tokens import next_token
from services.worker.kv import KVGroup
from services.worker.plan import BlockTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine import SequenceEnd, StepOutput
    from services.worker.plan import ScheduledSequence, StepPlan, StepResult

NAMESPACE = bytes(16)
EOS = 9


@dataclass
class TinyEngine:
    """An EngineCore, what it was asked, and what came out of it."""

    num_blocks: int = 8
    block_size: int = 4
    context_len: int = 1000
    max_step_tokens: int = 8
    max_sequences: int = 4
    #: What sim chooses from.
    table: tuple[int, ...] = (0, 1, 2, 3)
    #: Of its KV groups.
    windows: tuple[int | None, ...] = (None,)
    #: Blocks of its slower tiers, and what bringing one takes.
    tier_blocks: tuple[int, ...] = ()
    tier_ms: tuple[float, ...] = (0.0, 1.0, 5.0)
    step_ms: float = 10.0
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, SequenceEnd] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)
    #: By slower tier.
    owned_slower: dict[str, set[int]] = field(default_factory=dict)
    requests: dict[int, SequenceRequest] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        info = EngineInfo(
            engine="sim",
            model_revision="",
            tokenizer_digest="",
            vocab_size=10,
            context_len=self.context_len,
            block_size=self.block_size,
            total_blocks=self.num_blocks,
            max_sequences=self.max_sequences,
            eos_token_ids=(EOS,),
            resume="exact",
            tiers=("device", "host", "disk")[: len(self.tier_blocks) + 1],
            tier_blocks=self.tier_blocks,
            tier_ms_per_block=self.tier_ms[: len(self.tier_blocks) + 1],
        )
        self.clock = VirtualClock()
        times = Linear(step_ms=self.step_ms, step_ms_per_sequence=0.0, prefill_ms_per_token=1.0)
        self._runner = SimRunner(
            times, self.clock, self.table, num_blocks=self.num_blocks, block_size=self.block_size,
            tier_blocks=self.tier_blocks, tier_ms_per_block=info.tier_ms_per_block,
        )  # fmt: skip
        self.core = EngineCore(
            info,
            self,
            self.clock.now,
            max_step_tokens=self.max_step_tokens,
            max_sequences=self.max_sequences,
            kv_groups=[KVGroup((layer,), window) for layer, window in enumerate(self.windows)],
        )
        self._ids = count(1)
        #: By tier: slot -> (group, namespace, the tokens up to the one whose KV it holds).
        self._tiers: list[dict[int, tuple[int, bytes, tuple[int, ...]]]] = [
            {} for _ in range(1 + len(self.tier_blocks))
        ]
        self._kv = self._tiers[0]

    def execute(self, plan: StepPlan) -> StepResult:
        """The Runner interface: records what it is asked and checks the plan's own promises."""
        self.plans.append(plan)
        assert 0 < plan.num_tokens <= self.max_step_tokens
        self._copy(plan)
        for item in plan.scheduled:
            tables = [BlockTable(item.first_block, item.block_table), *item.more_tables]
            for group, table in enumerate(tables):
                assert table.first + len(table.blocks) == -(-item.end // self.block_size)
                self._check_kv(item, group, table)
        return self._runner.execute(plan)

    def _copy(self, plan: StepPlan) -> None:
        size = self.block_size
        for tier, source, target_tier, target in plan.moves:
            for offset in range(size):
                content = self._tiers[tier][source * size + offset]
                self._tiers[target_tier][target * size + offset] = content

    def _check_kv(self, item: ScheduledSequence, group: int, table: BlockTable) -> None:
        """Every position that a group sees holds what was computed for it; then compute."""
        request = self.requests[item.sequence_id]
        tokens = (request.prompt_ids + self.outputs[item.sequence_id])[: item.end]
        window, size = self.windows[group], self.block_size
        first = 0 if window is None else max(0, item.start - window + 1)
        for position in range(first, item.end):
            slot = table.blocks[position // size - table.first] * size + position % size
            content = (group, request.namespace_key, tuple(tokens[: position + 1]))
            if position < item.start:
                assert self._kv[slot] == content
            self._kv[slot] = content

    def submit(self, prompt: list[int], max_tokens: int | None = 4, **options: Any) -> int:
        """Queue a sequence; its id."""
        sampling = {
            name: options.pop(name) for name in ("stop_token_ids", "ignore_eos") if name in options
        }
        request = SequenceRequest(
            sequence_id=next(self._ids),
            prompt_ids=prompt,
            generated_ids=options.pop("generated", []),
            sampling=SamplingParams(seed=0, max_tokens=max_tokens, **sampling),
            namespace_key=options.pop("namespace", NAMESPACE),
            **options,
        )
        self.requests[request.sequence_id] = request
        self.outputs[request.sequence_id] = list(request.generated_ids)
        self.core.submit([request])
        return request.sequence_id

    def step(self) -> StepOutput:
        """One step, with all invariants checked after it."""
        output = self.core.step()
        self.core.check()
        for sequence_id, token in zip(output.sequence_ids, output.token_ids, strict=True):
            assert sequence_id not in self.ends
            self.outputs[sequence_id].append(token)
        for end in output.ends:
            assert end.sequence_id not in self.ends
            self.ends[end.sequence_id] = end
        assert not self.owned & set(output.stored)
        assert self.owned >= set(output.removed)
        self.owned = (self.owned | set(output.stored)) - set(output.removed)
        assert sorted(self.owned) == sorted(self.core.owned_blocks())
        for tier, (stored, removed) in output.slower.items():
            owned = self.owned_slower.setdefault(tier, set())
            assert not owned & set(stored)
            assert owned >= set(removed)
            self.owned_slower[tier] = (owned | set(stored)) - set(removed)
        for tier, ids in self.core.owned_slower().items():
            assert self.owned_slower.get(tier, set()) == set(ids)
        return output

    def drain(self, max_steps: int = 5000) -> None:
        """Step until nothing is left, and check that every output is the pure function's."""
        for _ in range(max_steps):
            if not self.core.has_work():
                break
            self.step()
        assert not self.core.has_work()
        assert self.core.stats().used_blocks == 0
        assert self.ends.keys() == self.requests.keys()
        for sequence_id in self.requests:
            self.check_output(sequence_id)

    def run(self, prompt: list[int], max_tokens: int | None = 4, **options: Any) -> SequenceEnd:
        """Submit one sequence and drain; its end."""
        sequence_id = self.submit(prompt, max_tokens, **options)
        self.drain()
        return self.ends[sequence_id]

    def check_output(self, sequence_id: int) -> None:
        """What came is what an undisturbed run brings: all of it, or its beginning if cut off."""
        request, end = self.requests[sequence_id], self.ends[sequence_id]
        found = self.outputs[sequence_id]
        assert end.completion_tokens == len(found)
        if end.reason == "error":
            return
        expected, reason = self.expected(request)
        if end.reason == "cancelled":
            assert found == expected[: len(found)]
        else:
            assert (found, end.reason) == (expected, reason)

    @property
    def kv_len(self) -> int:
        """Tokens of the longest sequence that the blocks hold."""
        size = self.block_size
        for length in range(self.context_len, 0, -1):
            needed = 0
            for window in self.windows:
                most = sys.maxsize
                if window is not None:
                    most = -(-(window + self.max_step_tokens) // size) + 1
                needed += min(-(-length // size), most)
            if needed <= self.num_blocks:
                return length // size * size if length < self.context_len else length
        return 0

    def expected(self, request: SequenceRequest) -> tuple[list[int], str]:
        """The output and end of `request`, from the definitions alone."""
        sampling = request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
        limit = min(self.context_len, self.kv_len)
        tokens = [*request.prompt_ids, *request.generated_ids]
        num_prompt = len(request.prompt_ids)
        while True:
            generated = tokens[num_prompt:]
            if generated and generated[-1] in stops:
                return generated, "stop"
            full = sampling.max_tokens is not None and len(generated) >= sampling.max_tokens
            if full or len(tokens) >= limit:
                return generated, "length"
            tokens.append(next_token(tokens, self.table))


@pytest.fixture
def tiny() -> Callable[..., TinyEngine]:
    """Makes tiny engines: `tiny(num_blocks=4)`."""
    return TinyEngine
