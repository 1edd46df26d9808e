"""Decoding attention by a Triton kernel that reads KV where it lies, in blocks.

A row's positions are cut into splits, each read by a program of its own, so that few
long sequences fill a GPU too; a second kernel joins what the splits found, by their
maxima and sums (Flash-Decoding, https://arxiv.org/abs/2205.14135 and its split form).
Imports Triton, which CUDA builds of torch bring: see decode.decode_way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from services.worker.engines.torch.attention.decode import Decodes
    from services.worker.model_config import LayerAttention

#: Positions of a split at least: joining costs as much as reading some hundred.
LEAST_SPLIT = 256
#: Programs per processor at which splitting further gains nothing.
_PROGRAMS = 2
#: Bytes of keys that a program holds at a time.
_TILE_BYTES = 16_384


@triton.jit
def _attend_split(
    query, stored, tables, positions, found, maxima, sums,
    query_row, query_head, head_stride, width, splits, scale, soft_cap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row's group of query heads over one split of its positions.

    HEADS are kv heads; WINDOW 0 is none. `found` is [rows, H, splits, D], `maxima` and
    `sums` [rows, H, splits], all float32.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(positions + row) + 1
    begin = end * 0
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    length = tl.cdiv(tl.cdiv(end - begin, splits), TILE) * TILE
    first = begin + split * length
    last = tl.minimum(first + length, end)

    group = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    is_query = (group < GROUP)[:, None] & (dim < DIM)[None, :]
    heads = head * GROUP + group
    q = tl.load(
        query + row * query_row + heads[:, None] * query_head + dim[None, :],
        mask=is_query, other=0.0,
    )  # fmt: skip
    keys = stored + head.to(tl.int64) * head_stride
    values = stored + (head + HEADS).to(tl.int64) * head_stride

    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    mixed = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for at in range(first, last, TILE):
        position = at + tl.arange(0, TILE)
        is_seen = position < last
        block = tl.load(tables + row * width + position // BLOCK, mask=is_seen, other=0)
        slot = block.to(tl.int64) * BLOCK + position % BLOCK
        place = slot[:, None] * DIM + dim[None, :]
        is_stored = is_seen[:, None] & (dim < DIM)[None, :]
        k = tl.load(keys + place, mask=is_stored, other=0.0)
        v = tl.load(values + place, mask=is_stored, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            # tanh; an exponential that overflows gives -1, as it must.
            scores = soft_cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / soft_cap)) - 1.0)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = higher

    place = (row * HEADS * GROUP + heads).to(tl.int64) * splits + split
    tl.store(maxima + place, best, mask=group < GROUP)
    tl.store(sums + place, total, mask=group < GROUP)
    tl.store(found + place[:, None] * DIM + dim[None, :], mixed, mask=is_query)


@triton.jit
def _join_splits(
    found, maxima, sums, result, splits,
    SPLITS_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
):  # fmt: skip
    """One head's splits, of `found` and so on as above, to a row of `result`, [rows · H, D]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.arange(0, DIM_PAD)
    is_split = split < splits
    best = tl.load(maxima + row * splits + split, mask=is_split, other=float("-inf"))
    # A split without positions has minus infinity here, and so the weight 0.
    weights = tl.exp(best - tl.max(best, 0))
    total = tl.sum(tl.load(sums + row * splits + split, mask=is_split, other=0.0) * weights, 0)
    parts = tl.load(
        found + (row * splits + split)[:, None] * DIM + dim[None, :],
        mask=is_split[:, None] & (dim < DIM)[None, :], other=0.0,
    )  # fmt: skip
    mixed = tl.sum(parts * weights[:, None], 0) / total
    tl.store(result + row * DIM + dim, mixed.to(result.dtype.element_ty), mask=dim < DIM)


def paged_decode(
    stored: torch.Tensor, query: torch.Tensor, decodes: Decodes, options: LayerAttention
) -> torch.Tensor:
    """See DecodeWay."""
    rows, heads, dim = query.shape
    kv_heads = len(stored) // 2
    block_size = stored.shape[2]
    width = decodes.tables.shape[1]
    seen = min(width * block_size, options.window or width * block_size)
    splits = num_splits(rows * kv_heads, seen, _processors(query.device))
    partial = torch.empty(rows, heads, splits, dim + 2, dtype=torch.float32, device=query.device)
    flat = partial.view(-1)
    count = rows * heads * splits
    found, maxima, sums = flat[: count * dim], flat[count * dim : -count], flat[-count:]
    result = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    _attend_split[(rows, kv_heads, splits)](
        query, stored, decodes.tables, decodes.positions, found, maxima, sums,
        query.stride(0), query.stride(1), stored.stride(0), decodes.tables.stride(0), splits,
        dim**-0.5 if options.scale is None else options.scale, options.soft_cap or 1.0,
        **constants(heads // kv_heads, kv_heads, dim, block_size, query.dtype, options),
    )  # fmt: skip
    _join_splits[(rows * heads,)](
        found, maxima, sums, result, splits,
        SPLITS_PAD=triton.next_power_of_2(splits), DIM=dim, DIM_PAD=_dim_pad(dim),
    )  # fmt: skip
    return result


def constants(
    group: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    dtype: torch.dtype,
    options: LayerAttention,
) -> dict[str, int | bool | str]:
    """What `_attend_split` is compiled for."""
    # 16 is the least side of a tensor core's product.
    tile = max(16, min(128, _TILE_BYTES // (_dim_pad(dim) * dtype.itemsize)))
    return {
        "GROUP": group,
        "GROUP_PAD": max(16, triton.next_power_of_2(group)),
        "HEADS": kv_heads,
        "DIM": dim,
        "DIM_PAD": _dim_pad(dim),
        "BLOCK": block_size,
        "TILE": tile,
        "WINDOW": options.window or 0,
        "CAPPED": options.soft_cap is not None,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def num_splits(programs: int, positions: int, processors: int) -> int:
    """Splits for so many (row, kv head) pairs: enough to fill the processors, none too short.

    By the longest that a row can be, as a graph is made for all lengths.
    """
    wanted = -(-processors * _PROGRAMS // programs)
    return max(1, min(wanted, positions // LEAST_SPLIT, 64))


def _dim_pad(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
