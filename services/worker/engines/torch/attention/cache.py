"""The KV cache: one tensor for a layer of each group, head-major.

    [2 · kv_heads, num_blocks + 1, block_size, head_dim]      keys first, then values

A head's keys of consecutive blocks are one matrix whose rows lie side by side.
One query over 576 keys took 100 µs in this order and 180 in the order of tokens
(float32, AVX2, 2 threads); keys and values together are written by one operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from services.worker.engines.torch.kernels import takes_heads
from services.worker.kv import KVGroup, block_layers, group_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engines.torch.device import Placement
    from services.worker.model_config import ModelConfig


def kv_groups(args: ModelConfig) -> tuple[KVGroup, ...]:
    """A model's layers by what they keep, see services/worker/kv/layout.py."""
    return group_layers([options.window for options in args.attention])


def bytes_per_position(args: ModelConfig, placement: Placement) -> int:
    """What a block of the cache takes, per position of the group that it is given to."""
    layers = block_layers(kv_groups(args))
    return 2 * layers * args.num_kv_heads * args.head_dim * placement.compute_dtype.itemsize


class KVCache:
    """All layers' keys and values. Memory is touched when first written.

    Behind the `num_blocks` there is one more, `spare_block`, which no sequence ever has:
    rows that only fill up a step write there.

    Layers of different `groups` share a tensor; a block is one group's at a time. By default
    all layers are in one group: a block holds all layers' KV.
    """

    def __init__(
        self,
        args: ModelConfig,
        num_blocks: int,
        block_size: int,
        placement: Placement,
        groups: Sequence[KVGroup] = (),
    ) -> None:
        self.num_kv_heads = args.num_kv_heads
        #: Whether the CPU's kernel takes such heads and numbers.
        self.suits_kernel = placement.compute_dtype == torch.float32 and takes_heads(
            args.num_heads, args.num_kv_heads, args.head_dim
        )
        #: How each layer attends.
        self.attention = args.attention
        self.block_size = block_size
        self.device = placement.device
        self.spare_block = num_blocks
        shape = (2 * args.num_kv_heads, num_blocks + 1, block_size, args.head_dim)
        # Zeros on a device where padding reads what nobody wrote (NaN · 0 is NaN).
        make = torch.empty if placement.device.type == "cpu" else torch.zeros
        #: Layers whose blocks are found by one table, and which group a layer is in.
        self.groups = tuple(groups) or (KVGroup(tuple(range(args.num_layers))),)
        self.group_of = {
            layer: index for index, group in enumerate(self.groups) for layer in group.layers
        }
        tensors = [
            make(shape, dtype=placement.compute_dtype, device=placement.device)
            for _ in range(block_layers(self.groups))
        ]
        for tensor in tensors:
            tensor[:, self.spare_block] = 0
        places = {
            layer: tensors[place]
            for group in self.groups
            for place, layer in enumerate(group.layers)
        }
        self.layers = [places[layer] for layer in range(args.num_layers)]
        #: The same by slot: [2 · kv_heads, (num_blocks + 1) · block_size, head_dim].
        self.slots = [layer.flatten(1, 2) for layer in self.layers]

    def write(self, layer: int, slots: torch.Tensor, key_value: torch.Tensor) -> None:
        """Store rows at slots. Shapes: [tokens], [tokens, 2 · kv_heads, head_dim]."""
        self.slots[layer].index_copy_(1, slots, key_value.transpose(0, 1))

    def locate(self, blocks: list[int]) -> int | torch.Tensor:
        """Where the KV of `blocks` lies, for `read`: its first slot if they are
        consecutive and need no copy, else their numbers.
        """
        first = blocks[0]
        if blocks == list(range(first, first + len(blocks))):
            return first * self.block_size
        return torch.tensor(blocks, device=self.device)

    def read(self, layer: int, where: int | torch.Tensor, length: int) -> torch.Tensor:
        """KV of the first `length` positions of some blocks: [2 · kv_heads, length, head_dim].

        A view if `where` is a slot, else a copy.
        """
        if isinstance(where, int):
            return self.slots[layer][:, where : where + length]
        return self.layers[layer].index_select(1, where).flatten(1, 2)[:, :length]
