"""The engine protocol: what `torch`, `tensorrt_llm` and `sim` implement.

An engine is stepped: it takes sequences, and each `step` computes for some of
them and says what came out. It runs in a process of its own (`engine_process`)
and is called from one thread; the worker around it, the same for all engines,
does streams, admission, leases, events, metrics and traces. Types here are plain
data without tensors, and this module imports no more than the standard library
and `headrace.params`, so that an engine runs on a bare machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from headrace.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

EndReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is started with. Engines take what concerns them."""

    model_path: str
    model_name: str
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int = 0
    block_size: int = 16
    #: KV blocks; 0: as many as `kv_cache_mib` holds.
    num_blocks: int = 0
    kv_cache_mib: int = 1024
    #: Longest sequence; 0: what the model says.
    context_len: int = 0
    #: Tokens that one step computes at most, and sequences it runs at most.
    max_step_tokens: int = 512
    max_sequences: int = 64
    #: Refuse to start unless logits are the same bits in any batch and any chunking.
    deterministic: bool = False
    #: sim: what steps take: a timing model's spec (engines/sim/timing), or "linear" by
    #: the three constants.
    sim_timing: str = "linear"
    sim_prefill_ms_per_token: float = 0.1
    sim_step_ms: float = 10.0
    sim_step_ms_per_sequence: float = 0.0
    #: sim: blocks of host memory and disk that evicted ones fall into, and bandwidths
    #: in GB/s at which they come back.
    sim_host_blocks: int = 0
    sim_host_gbps: float = 50.0
    sim_disk_blocks: int = 0
    sim_disk_gbps: float = 6.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine is and can do."""

    engine: str
    model_revision: str
    tokenizer_digest: str
    vocab_size: int
    context_len: int
    block_size: int
    total_blocks: int
    max_sequences: int
    eos_token_ids: tuple[int, ...]
    #: Whether a resumed sequence goes on to the identical tokens.
    resume: Literal["exact", "semantic"]
    modalities: tuple[str, ...] = ("text",)
    tiers: tuple[str, ...] = ("device",)
    #: Blocks of each tier after the device.
    tier_blocks: tuple[int, ...] = ()
    #: By tier, what bringing one block of it to the device takes, in ms; empty: not said.
    tier_ms_per_block: tuple[float, ...] = ()
    #: Fields of SamplingParams that may differ from their defaults.
    sampling: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. It resumes if `generated_ids` is not empty.

    `sampling.seed` and `.max_tokens` are set; `max_tokens` counts `generated_ids`.
    """

    sequence_id: int
    prompt_ids: list[int]
    generated_ids: list[int]
    sampling: SamplingParams
    namespace_key: bytes
    priority: int = 0
    tenant: str = ""
    #: What is left of its deadline, by which the scheduler orders; 0: none. Nothing
    #: ends a sequence that misses it: who submitted it cancels it.
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """How a sequence ended. Times are of the engine's clock."""

    sequence_id: int
    reason: EndReason
    prompt_tokens: int
    #: Tokens of prompt_ids + generated_ids whose KV was in the cache at the start.
    cached_tokens: int
    #: All generated tokens, those of before a resume included.
    completion_tokens: int
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    #: The last token delivered was an end or stop token.
    stopped_by_token: bool = False
    error: str = ""


class EngineStats(NamedTuple):
    """Load now, and totals since the start (see WorkerLoad in worker.proto).

    (A tuple: there are many, and they are cheap.)
    """

    active_sequences: int = 0
    queued_sequences: int = 0
    queued_prefill_tokens: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    step_ms: float = 0.0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_squares: int = 0
    prefill_context: int = 0
    decode_steps: int = 0
    decode_sequences: int = 0
    decode_context: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought.

    `sequence_ids[i]` got `token_ids[i]`, in order, with the record `logprobs[i]`, if it
    asked (packed, see headrace.logprobs); `prompt_logprobs` has, by sequence id, the
    next records of its prompt, all of which come before its first token. `stored` and
    `removed` are the net change of the prefix cache in short block ids: no id is in both.
    """

    step: int
    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ends: list[SequenceEnd] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)
    logprobs: dict[int, bytes] = field(default_factory=dict)
    prompt_logprobs: dict[int, bytes] = field(default_factory=dict)
    #: `stored` and `removed` of slower tiers, by name, of those that changed.
    slower: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)


class Engine(Protocol):
    """One model on one device or group of devices. Not thread-safe.

    Build with `EngineClass(config, report)`, where `report(phase, fraction)`
    tells of slow work. The constructor loads everything and raises StartupError
    with cause and cure when it can't.
    """

    info: EngineInfo

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        """Queue sequences. Never fails: a request that can't run ends with an error."""

    def cancel(self, sequence_ids: Sequence[int]) -> None:
        """Stop sequences at the next step, which brings their ends. Unknown ids are ignored."""

    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def step(self) -> StepOutput:
        """Compute for some sequences. Any exception means that the engine is broken."""

    def stats(self) -> EngineStats:
        """The load now."""

    def owned_blocks(self) -> list[int]:
        """Short ids of all blocks in the prefix cache, from the block manager itself."""

    def close(self) -> None:
        """Free the device."""
