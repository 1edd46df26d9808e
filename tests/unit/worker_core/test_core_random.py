"""Random submits, cancels, resumes and steps on very few blocks.

After every step TinyEngine checks that no block is lost, freed twice or shared
wrongly, and that the events add up to what is owned; at the end, that every
output is the pure function of its prompt, whatever the schedule was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.worker.plan import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.plan import Move

# A small alphabet, so that prompts share prefixes.
TOKENS = st.integers(0, 1)
PROMPTS = st.lists(TOKENS, max_size=14)


def machine(
    make: Callable[..., Any], preempted: list[int], brought: list[Move]
) -> type[RuleBasedStateMachine]:
    """The state machine over engines that `make` makes; counts preempted sequences and
    blocks brought from slower tiers."""

    class RandomCore(RuleBasedStateMachine):
        @initialize(
            num_blocks=st.integers(2, 8),
            block_size=st.integers(1, 4),
            context_len=st.integers(6, 30),
            max_sequences=st.integers(1, 4),
            spare=st.integers(0, 6),
            windows=st.sampled_from([(None,), (None,), (3,), (None, 1), (None, 5, 5), (2, 6)]),
            tier_blocks=st.sampled_from([(), (1,), (4,), (3, 2), (20, 20)]),
        )
        def start(
            self,
            max_sequences: int,
            spare: int,
            num_blocks: int,
            windows: tuple[int | None, ...],
            tier_blocks: tuple[int, ...],
            **sizes: int,
        ) -> None:
            self.engine = make(
                windows=windows,
                tier_blocks=tier_blocks if windows == (None,) else (),
                num_blocks=num_blocks * len(windows),
                max_sequences=max_sequences,
                max_step_tokens=max_sequences + spare,
                table=(0, 1, 1, 0, 2),
                **sizes,
            )

        @rule(
            prompt=PROMPTS,
            max_tokens=st.none() | st.integers(1, 12),
            priority=st.integers(0, 1),
            tenant=st.sampled_from(["", "other"]),
            timeout_ms=st.sampled_from([0, 20, 500]),
            namespace=st.sampled_from([bytes(16), bytes([1]) * 16]),
            stop_token_ids=st.sampled_from([(), (2,)]),
        )
        def submit(self, prompt: list[int], max_tokens: int | None, **options: Any) -> None:
            self.engine.submit(prompt, max_tokens, **options)

        @precondition(lambda self: any(e.reason == "cancelled" for e in self.engine.ends.values()))
        @rule(data=st.data())
        def resume(self, data: st.DataObject) -> None:
            lost = [i for i, end in self.engine.ends.items() if end.reason == "cancelled"]
            request = self.engine.requests[data.draw(st.sampled_from(lost))]
            self.engine.submit(
                request.prompt_ids,
                request.sampling.max_tokens,
                generated=list(self.engine.outputs[request.sequence_id]),
                stop_token_ids=request.sampling.stop_token_ids,
                namespace=request.namespace_key,
            )

        @precondition(lambda self: len(self.engine.requests) > len(self.engine.ends))
        @rule(data=st.data())
        def cancel(self, data: st.DataObject) -> None:
            live = sorted(self.engine.requests.keys() - self.engine.ends.keys())
            sequence_id = data.draw(st.sampled_from(live))
            self.engine.core.cancel([sequence_id])
            self.step()
            assert sequence_id in self.engine.ends

        @rule(count=st.integers(1, 4))
        def steps(self, count: int) -> None:
            for _ in range(count):
                self.step()

        def step(self) -> None:
            starts = {i.sequence_id for p in self.engine.plans[-1:] for i in p.scheduled}
            before = self.engine.core.stats()
            self.engine.step()
            after = self.engine.core.stats()
            now = {i.sequence_id for p in self.engine.plans[-1:] for i in p.scheduled}
            live = starts - now - self.engine.ends.keys()
            if live and after.queued_sequences >= before.queued_sequences:
                preempted.extend(live)

        def teardown(self) -> None:
            if hasattr(self, "engine"):
                self.engine.drain()
                moves = (move for plan in self.engine.plans for move in plan.moves)
                brought.extend(move for move in moves if move.target_tier == DEVICE)

    return RandomCore


def test_random_schedules_lose_nothing(tiny: Callable[..., Any]) -> None:
    preempted: list[int] = []
    brought: list[Move] = []
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine(tiny, preempted, brought),
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            # No explaining: it takes minutes on a machine of many steps.
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Else the machine would prove little.
    assert preempted
    assert brought


def test_random_schedules_find_a_block_shared_wrongly(tiny: Callable[..., Any]) -> None:
    """The machine can fail: a runner that forgets one block's content is noticed."""

    def make(**sizes: Any) -> Any:
        engine = tiny(**sizes)
        execute = engine._runner.execute

        def forgetful(plan: Any) -> Any:
            result = execute(plan)
            engine._runner._states[0] ^= 1
            return result

        engine._runner.execute = forgetful
        return engine

    with pytest.raises(AssertionError):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine(make, [], []),
            settings=settings(
                max_examples=200,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                print_blob=False,
                # The first failure is enough: no shrinking.
                phases=[Phase.generate],
            ),
        )
