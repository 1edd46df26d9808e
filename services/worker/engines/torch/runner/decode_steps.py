"""Decode steps through fixed buffers, replayed as CUDA graphs where that is possible.

A step is padded to one of a few shapes (buckets.py); rows that fill up are token 0 at
position 0 of a sequence in the cache's spare block. All inputs are in one buffer, which
one copy fills. Without `capture` the same code runs operation by operation.

A graph holds addresses: buffers are never replaced, all graphs share one memory pool,
and a step's logits are valid until the next step of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.attention import DecodeAttention, Decodes, spans_of
from services.worker.engines.torch.runner.buckets import is_decode, shape_of

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    from services.worker.engines.torch.attention import KVCache
    from services.worker.engines.torch.models import Model
    from services.worker.engines.torch.runner.buckets import Shape
    from services.worker.plan import StepPlan


class DecodeSteps:
    """Decode steps of one model and cache, of at most `max_rows` rows. Not thread-safe."""

    def __init__(self, model: Model, cache: KVCache, max_rows: int, *, capture: bool) -> None:
        self._model = model
        self._cache = cache
        self._max_rows = max_rows
        self._capture = capture
        #: A table is never longer than if a sequence had every block.
        self._max_width = cache.spare_block
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._steps: dict[Shape, _Step] = {}

    @property
    def num_captured(self) -> int:
        """Graphs made so far."""
        return sum(step.graph is not None for step in self._steps.values())

    def logits(self, plan: StepPlan) -> torch.Tensor | None:
        """The logits of a plan's rows, [rows, vocab]; None for a plan that no shape fits.

        To be called in inference mode.
        """
        if not is_decode(plan):
            return None
        blocks = max(-(-item.end // self._cache.block_size) for item in plan.scheduled)
        shape = shape_of(len(plan.scheduled), blocks, self._max_rows, self._max_width)
        if shape is None:
            return None
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = _Step(self._model, self._cache, shape)
        step.fill(plan)
        if self._capture and step.graph is None:
            step.capture(self._pool)
        return step.run()[: len(plan.scheduled)]


class _Step:
    """One shape: its inputs, and its graph once it is captured."""

    def __init__(self, model: Model, cache: KVCache, shape: Shape) -> None:
        self._model = model
        self._cache = cache
        self.graph: torch.cuda.CUDAGraph | None = None
        rows, width = shape
        groups = len(cache.groups)
        device = cache.device
        size = rows * (2 + groups * width)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(size, dtype=torch.int32, device=device)
        host = self._host.numpy()
        self._tokens, self._positions = host[:rows], host[rows : 2 * rows]
        self._tables = host[2 * rows :].reshape(groups, rows, width)
        self._tables.fill(cache.spare_block)
        #: Set when the device has read `_host`.
        self._sent: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no type
        self._shape = (groups, rows, width)
        self._used = 0
        self._logits: torch.Tensor | None = None

    def fill(self, plan: StepPlan) -> None:
        """Send a plan to the device."""
        if self._sent is not None:
            self._sent.synchronize()
        count = len(plan.scheduled)
        self._tokens[:count] = [item.token_ids[0] for item in plan.scheduled]
        self._positions[:count] = [item.start for item in plan.scheduled]
        # Rows of the step before.
        self._tokens[count : self._used] = 0
        self._positions[count : self._used] = 0
        self._tables[:, count : self._used] = self._cache.spare_block
        self._used = count
        for group in range(len(self._cache.groups)):
            for row, span in enumerate(spans_of(plan, self._cache.block_size, group)):
                table = self._tables[group, row]
                table[: len(span.blocks)] = span.blocks
                table[len(span.blocks) :] = self._cache.spare_block
        self._inputs.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def run(self) -> torch.Tensor:
        """Logits of all rows, [rows, vocab] float32."""
        if self.graph is None:
            return self._compute()
        assert self._logits is not None
        self.graph.replay()
        return self._logits

    def capture(self, pool: _POOL_HANDLE | None) -> None:
        """Make the graph. The inputs must be a step's: what warms up computes that step."""
        stream = torch.cuda.Stream(self._cache.device)  # type: ignore[no-untyped-call]  # torch's
        stream.wait_stream(torch.cuda.current_stream(self._cache.device))
        # Kernels are compiled and libraries take their workspaces, which no graph can hold.
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream(self._cache.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._logits = self._compute()
        self.graph = graph

    def _compute(self) -> torch.Tensor:
        groups, rows, width = self._shape
        sizes = [rows, rows, groups * rows * width]
        tokens, positions, tables = torch.split_with_sizes(self._inputs.long(), sizes)
        attend = DecodeAttention(
            self._cache, [Decodes(table, positions) for table in tables.view(groups, rows, width)]
        )
        return self._model.logits(self._model(tokens, positions, attend)).float()
