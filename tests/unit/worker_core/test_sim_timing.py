"""What simulated steps take, and the specs that name timing models."""

from __future__ import annotations

import pytest

from headrace.errors import StartupError
from services.worker.engines.sim.timing import Defaults, StepWork, create

CAPACITY = 16384 * 64


def work(num_decodes: int = 0, context: int = 0, *prefills: tuple[int, int]) -> StepWork:
    """Decodes that read `context` tokens each, and chunks of prefills."""
    return StepWork(num_decodes, num_decodes * context, list(prefills), CAPACITY)


def test_linear_adds_up() -> None:
    times = create("linear:step_ms=10,step_ms_per_sequence=2,prefill_ms_per_token=0.5")
    assert times.milliseconds(work(2, 100)) == 14
    assert times.milliseconds(work(0, 0, (8, 0))) == 4
    assert times.milliseconds(work(1, 5, (8, 0), (2, 64))) == 17


def test_linear_takes_what_a_spec_is_silent_of_from_the_engines_flags() -> None:
    times = create("linear:step_ms=1", Defaults(step_ms=5, prefill_ms_per_token=2))
    assert times.milliseconds(work(1, 5, (3, 0))) == 1 + 6


def test_the_polynomials_are_the_mockers() -> None:
    """By hand, from the figures in the module's docstring."""
    times = create("polynomial")
    prefill = 4.209989e-7 * 8192**2 + 1.518344e-2 * 8192 + 16.50142
    assert times.milliseconds(work(0, 0, (8192, 0))) == pytest.approx(prefill)
    # Chunks count together, and what was cached before them costs nothing.
    assert times.milliseconds(work(0, 0, (8000, 0), (192, 5000))) == pytest.approx(prefill)
    used = 0.25
    decode = -25.74 * used**2 + 54.01 * used + 5.74
    assert times.milliseconds(work(64, CAPACITY // 256)) == pytest.approx(decode)
    both = work(64, CAPACITY // 256, (8192, 0))
    assert times.milliseconds(both) == pytest.approx(prefill + decode)
    # Shared blocks count for each sequence: more tokens than there is room for are all of it.
    assert times.milliseconds(work(2, CAPACITY)) == pytest.approx(-25.74 + 54.01 + 5.74)
    assert create("polynomial:speedup=10").milliseconds(both) == pytest.approx(
        (prefill + decode) / 10
    )


def test_roofline_of_one_gpu_by_hand() -> None:
    """Llama 3.1 8B in bf16 on an H100, its 7.5 billion weights beside the embedding."""
    times = create("roofline:gpu=h100,model=llama-3.1-8b")
    weights = 32 * (2 * 4096 * 128 * 40 + 3 * 4096 * 14336) + 4096 * 128256
    assert weights == pytest.approx(7.5e9, rel=0.01)
    # One token is bound by memory: all weights and the KV (128 KiB a token) are read once.
    kv = 1001 * 2 * 2 * 32 * 8 * 128
    read_ms = (2 * weights + kv) / (3.35e12 * 0.8) * 1000
    assert times.milliseconds(work(1, 1000)) == pytest.approx(1 + read_ms)
    # A long prefill is bound by arithmetic.
    flops = 2 * (weights - 4096 * 128256) * 8192 + 2 * 4096 * 128256
    flops += 4 * 32 * 32 * 128 * 8192**2 / 2
    assert times.milliseconds(work(0, 0, (8192, 0))) == pytest.approx(
        1 + flops / (989e12 * 0.5) * 1000
    )


def test_roofline_orders_hardware_as_it_is() -> None:
    prefill, decode = work(0, 0, (8192, 0)), work(64, 4000)

    def ms(spec: str, step: StepWork) -> float:
        return create(f"roofline:model=llama-3.1-70b,tp=8,{spec}").milliseconds(step)

    assert ms("gpu=h200", decode) < ms("gpu=h100", decode)
    assert ms("gpu=h200", prefill) == ms("gpu=h100", prefill)
    assert ms("gpu=b200", prefill) < ms("gpu=h100", prefill)
    for dtypes in (("bf16", "fp8"), ("fp8", "fp4")):
        slow, fast = (ms(f"gpu=b200,dtype={dtype}", decode) for dtype in dtypes)
        assert fast < slow
    one = create("roofline:model=llama-3.1-70b").milliseconds(decode)
    # Eight GPUs are faster than one, and less than eight times: they talk.
    assert one / 8 < ms("gpu=h100", decode) < one


def test_a_mixture_reads_fewer_weights_for_few_tokens() -> None:
    times = create("roofline:model=mixtral-8x7b")
    one, many = (times.milliseconds(work(n, 10)) for n in (1, 64))
    # 13 of 47 billion weights are one token's.
    assert 0.2 < one / many < 0.4


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("warp", "'warp' is unknown; there are linear, polynomial, roofline"),
        ("linear:step_ms", "KEY=VALUE"),
        ("linear:step_ms=1,step_ms=2", "each once"),
        ("linear:step_ms=nan", "step_ms must be a number of 0 or more, not 'nan'"),
        ("linear:step_ms=-1", "step_ms must be a number of 0 or more"),
        ("linear:steps=1", "has no steps; it has step_ms"),
        ("polynomial:speedup=0", "speedup must be"),
        ("roofline:gpu=abacus", "gpu 'abacus' is unknown; there are b200, h100, h200"),
        ("roofline:dtype=fp4", "dtype 'fp4' is unknown; there are bf16, fp8"),
        ("roofline:model=gpt", "model 'gpt' is unknown"),
        ("roofline:tp=3", "tp must divide the model's 32 heads, not 3"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: str, said: str) -> None:
    with pytest.raises(StartupError, match=said):
        create(spec)
