"""The best of many logits, found through the best of each block of them.

The k best of a row lie in the k blocks with the best maxima: so one cheap pass
over the vocabulary leaves few tokens to look at. Works on any device; the plain
twins are torch's `argmax`, `topk` and `sort`.
"""

from __future__ import annotations

import numpy as np
import torch

#: Tokens in a block. Small blocks leave fewer tokens to look at, large ones fewer blocks.
BLOCK = 64


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The lowest id of the best token in each row. Shapes: [rows, vocab] -> [rows] int64."""
    blocks = _in_blocks(logits)
    if blocks is None:
        return logits.argmax(-1)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(logits), device=logits.device), block].argmax(-1)
    return block * BLOCK + inside


def top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of the best `count` tokens of each row, best first.

    Shapes: [rows, vocab] -> [rows, count], [rows, count] int64. Equal values are in any order.
    """
    blocks = _in_blocks(logits)
    if blocks is None or 4 * count >= blocks.shape[1]:
        return _top_of_all(logits, count)
    which = blocks.amax(-1).topk(count, sorted=False).indices
    near = blocks.gather(1, which[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, at = near.topk(count)
    return values, which.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def _top_of_all(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if logits.device.type != "cpu" or count < 256 or count == logits.shape[1]:
        values, ids = logits.topk(count)
        return values, ids
    # numpy's partition is many times faster than torch's.
    ids = torch.from_numpy(np.argpartition(logits.numpy(), -count, axis=-1)[:, -count:].copy())
    values, order = logits.gather(1, ids).sort(descending=True)
    return values, ids.gather(1, order)


def descending(logits: torch.Tensor) -> torch.Tensor:
    """Each row's values in order, without their ids. numpy's sort is many times faster here."""
    if logits.device.type != "cpu":
        return logits.sort(descending=True).values
    ordered = np.sort(logits.numpy(), axis=-1)
    return torch.from_numpy(ordered).flip(-1)


def _in_blocks(logits: torch.Tensor) -> torch.Tensor | None:
    """[rows, blocks, BLOCK]; None where that is not a view, or the vocabulary is tiny."""
    rows, vocab_size = logits.shape
    if vocab_size % BLOCK or vocab_size < 16 * BLOCK or not logits.is_contiguous():
        return None
    return logits.view(rows, -1, BLOCK)
