"""How much of a GPU does the torch engine use?

A model of Llama-3-8B's shape with random bfloat16 weights. Decode at batch 1, 8 and 64
is set against the card's measured copy bandwidth (weights and KV are read once a
step), prefill of 8,192 tokens against its measured matrix product rate. Needs torch and
a checkout, nothing else; no peer, so `ratios` is empty.

    python benchmarks/engine_gpu.py [--layers 32] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
    from collections.abc import Callable

BLOCK_SIZE = 16
CONTEXT = 1024
PREFILL = 8192
#: Tokens of a prefill step.
CHUNK = 2048


class RandomWeights:
    """Weights small enough that nothing overflows."""

    def take(self, name: str, out: torch.Tensor) -> None:
        """See TensorSource."""
        out.normal_(0.0, 0.02) if out.ndim > 1 else out.fill_(1.0)


def shape(layers: int) -> ModelConfig:
    """Llama-3-8B's config.json, with fewer layers if asked."""
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prefill", type=int, default=PREFILL)
    args = parser.parse_args()
    placement = place(args.device, "bfloat16")
    config = shape(args.layers)
    bandwidth, rate = copy_bandwidth(placement), matmul_rate(placement)
    with torch.inference_mode():
        model = model_class("llama")(config, Builder(RandomWeights(), placement))
    num_blocks = max(max(args.batches) * CONTEXT, args.prefill) // BLOCK_SIZE
    runner = TorchRunner(model, KVCache(config, num_blocks, BLOCK_SIZE, placement))
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    per_layer = config.hidden_size * (2 * query + 2 * kv + 3 * config.intermediate_size)
    body, head = per_layer * config.num_layers, config.hidden_size * config.vocab_size
    rows, figures = (
        [],
        {"copy_gb_s": round(bandwidth / 1e9), "matmul_tflop_s": round(rate / 1e12, 1)},
    )
    for batch in args.batches:
        plan = decode_plan(batch)
        elapsed = seconds(lambda plan=plan: runner.execute(plan), placement.device)  # type: ignore[misc]
        kv_bytes = config.kv_elements_per_token * placement.compute_dtype.itemsize
        read = (body + head) * placement.weight_dtype.itemsize + batch * CONTEXT * kv_bytes
        used = read / elapsed / bandwidth
        rows.append([f"decode, {batch}", f"{elapsed * 1e3:.2f} ms", f"{used:.0%} of bandwidth"])
        figures[f"decode_bandwidth_used_b{batch}"] = round(used, 3)
    plans = prefill_plans(args.prefill)
    elapsed = seconds(lambda: [runner.execute(plan) for plan in plans], placement.device, 2)
    attention = 2 * config.num_layers * query * args.prefill**2
    used = (2 * body * args.prefill + attention + 2 * head) / elapsed / rate
    rows.append([f"prefill, {args.prefill}", f"{elapsed * 1e3:.0f} ms", f"{used:.0%} of FLOP/s"])
    figures["prefill_flops_used"] = round(used, 3)
    print(table(["what", "time", "used"], rows))
    print("\nfp8 against bfloat16: not available, the engine has no fp8 weights yet")
    print(last_line("engine_gpu", ratios={}, figures=figures, versions=versions("torch")))


if __name__ == "__main__":
    main()
