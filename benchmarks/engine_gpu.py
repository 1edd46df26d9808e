"""How much of a GPU does the torch engine use?

A model of Llama-3-8B's shape with random bfloat16 weights. Decode at batch 1, 8 and 64
is set against the card's measured copy bandwidth (weights and KV are read once a
step), prefill of 8,192 tokens against its measured matrix product rate. On CUDA, decode
is replayed from graphs. Then the same with linear layers in float8 (e4m3, one scale a
tensor), where the device multiplies it: what a quantization could gain, not a feature.
Needs torch and a checkout, nothing else; no peer, so `ratios` is empty.

    python benchmarks/engine_gpu.py [--layers 32] [--device cuda]
    python benchmarks/engine_gpu.py --tiny                  # a small shape on a CPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from harness.report import last_line, table, versions

from headrace.params import SamplingParams
from services.worker.engines.torch.attention import KVCache
from services.worker.engines.torch.device import Placement, place
from services.worker.engines.torch.layers import Builder
from services.worker.engines.torch.models import model_class
from services.worker.engines.torch.runner import TorchRunner
from services.worker.model_config import LayerAttention, ModelConfig, RopeConfig
from services.worker.plan import ScheduledSequence, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from services.worker.engines.torch.layers.linear import Linear

BLOCK_SIZE = 16
CONTEXT = 1024
PREFILL = 8192
#: Tokens of a prefill step.
CHUNK = 2048
FLOAT8 = torch.finfo(torch.float8_e4m3fn)


class RandomWeights:
    """Weights small enough that nothing overflows, drawn on the device: a CPU takes minutes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, name: str, out: torch.Tensor) -> None:
        """See TensorSource."""
        if out.ndim == 1:
            out.fill_(1.0)
        else:
            drawn = torch.empty(out.shape, dtype=out.dtype, device=self._device)
            out.copy_(drawn.normal_(0.0, 0.02))


class Float8Linear:
    """y = x Wᵀ in float8: weights scaled once, activations by each call's largest."""

    def __init__(self, weight: torch.Tensor) -> None:
        scale = weight.abs().amax().float() / FLOAT8.max
        self._weight = (weight / scale).to(torch.float8_e4m3fn).t()  # column-major, as it must be
        self._scale = scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax().float() / FLOAT8.max).clamp(min=1e-12)
        rows = (x / scale).clamp(-FLOAT8.max, FLOAT8.max).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            rows, self._weight, scale_a=scale, scale_b=self._scale, out_dtype=x.dtype
        )


class Float8Builder(Builder):
    """Makes the blocks' linear layers float8; the output projection stays as it is."""

    def linear(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> Linear:
        """See Builder."""
        if bias or "lm_head" in parts:
            return super().linear(in_features, parts, bias=bias)
        weight = torch.empty(
            sum(parts.values()), in_features, dtype=self.placement.weight_dtype,
            device=self.placement.device,
        )  # fmt: skip
        self._source.take("", weight)
        return Float8Linear(weight)


def float8_obstacle(placement: Placement) -> str | None:
    """Why float8 is not measured; None: it is."""
    if placement.device.type != "cuda":
        return "only measured on CUDA"
    found = torch.cuda.get_device_capability(placement.device)
    return None if found >= (8, 9) else f"needs compute capability 8.9, this is {found}"


def shape(layers: int, *, tiny: bool) -> ModelConfig:
    """Llama-3-8B's config.json, with fewer layers if asked."""
    if tiny:
        return ModelConfig(
            architecture="llama", vocab_size=2048, context_len=2 * PREFILL, num_layers=2,
            hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
            rms_norm_eps=1e-5, rope=RopeConfig(theta=500_000.0, rotary_dim=32),
            tie_embeddings=False, eos_token_ids=(1,), bos_token_id=0,
            attention=(LayerAttention(),) * 2,
        )  # fmt: skip
    return ModelConfig(
        architecture="llama", vocab_size=128_256, context_len=2 * PREFILL, num_layers=layers,
        hidden_size=4096, intermediate_size=14_336, num_heads=32, num_kv_heads=8, head_dim=128,
        rms_norm_eps=1e-5, rope=RopeConfig(theta=500_000.0, rotary_dim=128),
        tie_embeddings=False, eos_token_ids=(128_001,), bos_token_id=128_000,
        attention=(LayerAttention(),) * layers,
    )  # fmt: skip


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median time of `work` after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(placement: Placement) -> float:
    """Bytes per second, read and written."""
    size = 1 << (30 if placement.device.type == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=placement.device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), placement.device)


def matmul_rate(placement: Placement) -> float:
    """Floating-point operations per second of a large product."""
    size = 8192 if placement.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=placement.device, dtype=placement.compute_dtype)
    return 2 * size**3 / seconds(lambda: a @ a, placement.device)


def decode_plan(batch: int) -> StepPlan:
    """Every sequence's next token at CONTEXT, each in blocks of its own."""
    blocks = CONTEXT // BLOCK_SIZE
    return StepPlan(
        [ScheduledSequence(i, [1], CONTEXT - 1, list(range(i * blocks, (i + 1) * blocks)), True,
                           SamplingParams(temperature=0.0)) for i in range(batch)]
    )  # fmt: skip


def prefill_plans(length: int) -> list[StepPlan]:
    """One sequence's prompt in chunks."""
    table = list(range(length // BLOCK_SIZE))
    params = SamplingParams(temperature=0.0)
    return [
        StepPlan([ScheduledSequence(0, [1] * CHUNK, start, table, start + CHUNK == length, params)])
        for start in range(0, length, CHUNK)
    ]


class Measured(NamedTuple):
    """Seconds of a step by batch, and of the prefill."""

    decode: dict[int, float]
    prefill: float


def measure(config: ModelConfig, build: Builder, batches: Sequence[int], prefill: int) -> Measured:
    """Make a model and run it; its memory is free afterwards."""
    placement = build.placement
    with torch.inference_mode():
        model = model_class("llama")(config, build)
    num_blocks = max(max(batches) * CONTEXT, prefill) // BLOCK_SIZE
    cache = KVCache(config, num_blocks, BLOCK_SIZE, placement)
    runner = TorchRunner(model, cache, graph_rows=max(batches))
    decode = {}
    for batch in batches:
        plan = decode_plan(batch)
        decode[batch] = seconds(partial(runner.execute, plan), placement.device, 20)
    plans = prefill_plans(prefill)
    elapsed = seconds(lambda: [runner.execute(plan) for plan in plans], placement.device, 2)
    return Measured(decode, elapsed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prefill", type=int, default=PREFILL)
    parser.add_argument("--tiny", action="store_true", help="a small shape, on a CPU")
    args = parser.parse_args()
    placement = place("cpu" if args.tiny else args.device, "bfloat16")
    config = shape(args.layers, tiny=args.tiny)
    bandwidth, rate = copy_bandwidth(placement), matmul_rate(placement)
    figures: dict[str, object] = {
        "copy_gb_s": round(bandwidth / 1e9, 1),
        "matmul_tflop_s": round(rate / 1e12, 2),
    }
    weights = RandomWeights(placement.device)
    found = measure(config, Builder(weights, placement), args.batches, args.prefill)
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)
    body, head = per_layer * config.num_layers, config.hidden_size * config.vocab_size
    rows = []
    kv_bytes = config.kv_elements_per_token * placement.compute_dtype.itemsize
    for batch, elapsed in found.decode.items():
        read = (body + head) * placement.weight_dtype.itemsize + batch * CONTEXT * kv_bytes
        used = read / elapsed / bandwidth
        rows.append([f"decode, {batch}", f"{elapsed * 1e3:.2f} ms", f"{used:.0%} of bandwidth"])
        figures[f"decode_bandwidth_used_b{batch}"] = round(used, 3)
    # Half of the products of queries and keys, and of weights and values, are behind the mask.
    attention = 2 * config.num_layers * query * args.prefill**2
    used = (2 * body * args.prefill + attention + 2 * head) / found.prefill / rate
    rows.append(
        [f"prefill, {args.prefill}", f"{found.prefill * 1e3:.0f} ms", f"{used:.0%} of FLOP/s"]
    )
    figures["prefill_flops_used"] = round(used, 3)
    obstacle = float8_obstacle(placement)
    if obstacle is None:
        small = measure(config, Float8Builder(weights, placement), args.batches, args.prefill)
        for batch, elapsed in small.decode.items():
            gain = found.decode[batch] / elapsed
            rows.append([f"float8 decode, {batch}", f"{elapsed * 1e3:.2f} ms", f"{gain:.2f} times"])
            figures[f"float8_decode_gain_b{batch}"] = round(gain, 2)
        gain = found.prefill / small.prefill
        rows.append(["float8 prefill", f"{small.prefill * 1e3:.0f} ms", f"{gain:.2f} times"])
        figures["float8_prefill_gain"] = round(gain, 2)
    print(table(["what", "time", "used"], rows))
    if obstacle is not None:
        print(f"\nfloat8 against bfloat16: not available, {obstacle}")
    print(last_line("engine_gpu", ratios={}, figures=figures, versions=versions("torch")))


if __name__ == "__main__":
    main()
