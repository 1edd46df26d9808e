"""A step's time from what a GPU can do and a model must do: the slower of the two sides.

    step    = overhead + max(compute, memory) + all-reduce
    compute = (2 · active weights · tokens + attention) / (tp · peak FLOP/s · EFFICIENCY)
    memory  = (weights read + KV read and written) / (tp · bandwidth · MEMORY_EFFICIENCY)
    attention of n tokens after m cached ones = 4 · layers · heads · head_dim · n · (m + n / 2)
    all-reduce = 2 a layer of the step's activations, ring: 2 (tp - 1) / tp · bytes / link + latency

after Williams, Waterman, Patterson, "Roofline" (CACM 2009); the transformer's counts are
those of Kaplan et al. (arXiv:2001.08361, 2 FLOP a weight and token) and Pope et al.
(arXiv:2211.05102, tensor parallelism: two all-reduces a layer). The output projection
counts for sampled tokens only, that is one a sequence.

Peaks are dense, of NVIDIA's data sheets: H100 SXM (989 TFLOP/s bf16, 1,979 fp8,
3.35 TB/s, NVLink 900 GB/s), H200 SXM (the same compute, 4.8 TB/s), B200 as in HGX
(2,250, 4,500 and 9,000 in fp4, 8 TB/s, NVLink 1,800 GB/s; both directions together).

Assumptions, none of them measured here: matrix products reach half of the peak, memory
0.8 of it, links 0.7 of one direction; an all-reduce takes 10 µs at least; a step costs
1 ms beside (launches, sampling, the host); KV has the weights' type, in fp4 fp8; of a
mixture, a step reads every expert that its tokens are expected to choose, spread evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.errors import StartupError

if TYPE_CHECKING:
    from services.worker.engines.sim.timing.base import StepWork
    from services.worker.engines.sim.timing.specs import Defaults, Options
    from services.worker.model_config import ModelConfig

EFFICIENCY = 0.5
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.7
ALL_REDUCE_LATENCY_MS = 0.010
OVERHEAD_MS = 1.0
#: Activations are summed in 16 bits whatever the weights are.
_ACTIVATION_BYTES = 2


class Gpu(NamedTuple):
    """Peaks of one GPU: FLOP/s by type of weight, bytes/s of memory, bytes/s one way of links."""

    flops: dict[str, float]
    memory: float
    link: float


GPUS = {
    "h100": Gpu({"bf16": 989e12, "fp8": 1979e12}, 3.35e12, 450e9),
    "h200": Gpu({"bf16": 989e12, "fp8": 1979e12}, 4.8e12, 450e9),
    "b200": Gpu({"bf16": 2250e12, "fp8": 4500e12, "fp4": 9000e12}, 8e12, 900e9),
}

#: Bytes of a weight, and of a number in the KV cache.
DTYPES = {"bf16": (2.0, 2.0), "fp8": (1.0, 1.0), "fp4": (0.5, 1.0)}


class Shape(NamedTuple):
    """Sizes of a decoder, as its config.json has them. `experts` 1: one feed-forward for all."""

    layers: int
    hidden: int
    #: Of each expert.
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 1
    experts_per_token: int = 1


MODELS = {
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "llama-3.1-405b": Shape(126, 16384, 53248, 128, 8, 128, 128256),
    "mixtral-8x7b": Shape(32, 4096, 14336, 32, 8, 128, 32000, 8, 2),
    "qwen3-32b": Shape(64, 5120, 25600, 64, 8, 128, 151936),
    "qwen3-30b-a3b": Shape(48, 2048, 768, 32, 4, 128, 151936, 128, 8),
}


@dataclass(frozen=True, slots=True)
class Roofline:
    """See the module's docstring."""

    gpu: Gpu
    shape: Shape
    dtype: str = "bf16"
    tp: int = 1

    def milliseconds(self, work: StepWork) -> float:
        """See StepTiming."""
        tokens = work.num_decodes + work.prefill_tokens
        if not tokens:
            return 0.0
        # A prefill's last chunk samples too; which is the last, the work does not say.
        sampled = work.num_decodes + len(work.prefills)
        bound = max(self._compute_s(work, tokens, sampled), self._memory_s(work, tokens))
        return OVERHEAD_MS + 1000 * bound + self._all_reduce_ms(tokens)

    def _compute_s(self, work: StepWork, tokens: int, sampled: int) -> float:
        shape = self.shape
        weights = _attention_weights(shape) + shape.experts_per_token * _expert_weights(shape)
        flops = 2.0 * (shape.layers * weights * tokens + shape.hidden * shape.vocab * sampled)
        pairs = work.decode_tokens + sum(n * (m + n / 2) for n, m in work.prefills)
        flops += 4.0 * shape.layers * shape.heads * shape.head_dim * pairs
        return flops / (self.tp * self.gpu.flops[self.dtype] * EFFICIENCY)

    def _memory_s(self, work: StepWork, tokens: int) -> float:
        shape = self.shape
        weight_bytes, kv_bytes = DTYPES[self.dtype]
        missed = (1 - shape.experts_per_token / shape.experts) ** tokens
        experts = _expert_weights(shape) * shape.experts * (1 - missed)
        weights = shape.layers * (_attention_weights(shape) + experts) + shape.hidden * shape.vocab
        read = work.decode_tokens + sum(m for _, m in work.prefills)
        kv = 2.0 * shape.layers * shape.kv_heads * shape.head_dim * (read + tokens)
        total = weights * weight_bytes + kv * kv_bytes
        return total / (self.tp * self.gpu.memory * MEMORY_EFFICIENCY)

    def _all_reduce_ms(self, tokens: int) -> float:
        if self.tp == 1:
            return 0.0
        size = tokens * self.shape.hidden * _ACTIVATION_BYTES
        ring = 2 * (self.tp - 1) / self.tp * size / (self.gpu.link * LINK_EFFICIENCY)
        return 2 * self.shape.layers * (ALL_REDUCE_LATENCY_MS + 1000 * ring)


def _attention_weights(shape: Shape) -> float:
    """Query, key, value and output projections of one layer."""
    return 2.0 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)


def _expert_weights(shape: Shape) -> float:
    """Gate, up and down projections of one expert of one layer."""
    return 3.0 * shape.hidden * shape.intermediate


def create(options: Options, defaults: Defaults) -> Roofline:
    """From a spec's options: gpu, model (of `MODELS`; a worker's own if not said), dtype, tp."""
    gpu = GPUS[options.choice("gpu", "h100", list(GPUS))]
    own = "" if defaults.model is None else "own"
    name = options.choice("model", own or "llama-3.1-8b", [*MODELS, *filter(None, [own])])
    shape = _shape(defaults.model) if defaults.model is not None and name == own else MODELS[name]
    dtype = options.choice("dtype", "bf16", sorted(gpu.flops))
    tp = options.number("tp", 1, least=1)
    if tp != int(tp) or shape.heads % int(tp):
        raise StartupError(
            f"sim timing 'roofline': tp must divide the model's {shape.heads} heads, not {tp:g}"
        )
    return Roofline(gpu, shape, dtype, int(tp))


def _shape(model: ModelConfig) -> Shape:
    experts = model.experts
    return Shape(
        model.num_layers,
        model.hidden_size,
        experts.intermediate_size if experts else model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.vocab_size,
        experts.num_experts if experts else 1,
        experts.num_experts_per_token if experts else 1,
    )
