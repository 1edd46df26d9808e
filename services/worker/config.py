"""What a worker is started with."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import option
from headrace.registry import LEASE_TTL_MS
from services.worker.engine import EngineConfig


@dataclass(frozen=True)
class WorkerConfig:
    """Flags, environment and file of one worker; see headrace.config."""

    model: str = option(help="model to serve: a name, a path or NAME=PATH", metavar="SPEC")
    listen: str = option("127.0.0.1:0", help="where to serve gRPC", metavar="HOST:PORT")
    advertise: str | None = option(
        None, help="address that others reach it at, if not the listen address", metavar="HOST:PORT"
    )
    redis: str = option(
        "redis://127.0.0.1:6379/0", help="where ownership is published", metavar="URL"
    )
    worker_id: str | None = option(None, help="name of this worker, if not its address")
    partitions: int = option(
        1, help="partitions of the model's workers in Redis, if this worker is the model's first"
    )
    lease_ttl_ms: int = option(
        LEASE_TTL_MS, help="how long Redis believes in this worker without hearing of it"
    )
    engine: str = option("torch", help="what computes: torch or sim")
    dtype: str = option("auto", help="type of weights and KV cache")
    device: str = option("auto", help="cpu, cuda or cuda:N")
    num_threads: int = option(0, help="CPU threads of the engine; 0: the engine chooses")
    block_size: int = option(16, help="tokens in a KV block")
    num_blocks: int = option(0, help="KV blocks; 0: as many as --kv-cache-mib holds")
    kv_cache_mib: int = option(1024, help="memory for the KV cache")
    context_len: int = option(0, help="longest sequence; 0: what the model says")
    max_step_tokens: int = option(512, help="tokens that one step computes at most")
    max_sequences: int = option(64, help="sequences that one step runs at most")
    deterministic: bool = option(
        False, help="the same logits, to the bit, in any batch; refused where that can't be"
    )
    sim_timing: str = option(
        "linear",
        help="sim: what steps take: linear, polynomial or roofline, or NAME:KEY=VALUE,…",
        metavar="SPEC",
    )
    sim_prefill_ms_per_token: float = option(0.1, help="sim: time that a prompt token takes")
    sim_step_ms: float = option(10.0, help="sim: time that a step takes at least")
    sim_step_ms_per_sequence: float = option(0.0, help="sim: time that a decoded sequence adds")
    sim_host_blocks: int = option(0, help="sim: blocks of host memory that evicted ones fall into")
    sim_host_gbps: float = option(50.0, help="sim: GB/s at which they come back")
    sim_disk_blocks: int = option(0, help="sim: blocks of disk that host memory's fall into")
    sim_disk_gbps: float = option(6.0, help="sim: GB/s at which they come back")
    max_queued: int = option(1024, help="sequences that may wait beyond those that run")
    session_grace_s: float = option(3.0, help="how long a gateway that lost its stream may return")
    drain_timeout_s: float = option(60.0, help="how long running sequences may finish at the end")

    def engine_config(self, model_name: str, model_path: str) -> EngineConfig:
        """The engine's part, for a resolved model."""
        return EngineConfig(
            model_path=model_path,
            model_name=model_name,
            dtype=self.dtype,
            device=self.device,
            num_threads=self.num_threads,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            kv_cache_mib=self.kv_cache_mib,
            context_len=self.context_len,
            max_step_tokens=self.max_step_tokens,
            max_sequences=self.max_sequences,
            deterministic=self.deterministic,
            sim_timing=self.sim_timing,
            sim_prefill_ms_per_token=self.sim_prefill_ms_per_token,
            sim_step_ms=self.sim_step_ms,
            sim_step_ms_per_sequence=self.sim_step_ms_per_sequence,
            sim_host_blocks=self.sim_host_blocks,
            sim_host_gbps=self.sim_host_gbps,
            sim_disk_blocks=self.sim_disk_blocks,
            sim_disk_gbps=self.sim_disk_gbps,
        )
