"""The slower tiers of a simulated worker: how many blocks, and how long one takes to come.

    ms per block = block_size · bytes per token / bandwidth

Defaults are what one GPU of an H100 server gets: 50 GB/s from host memory over PCIe 5.0
x16 (64 GB/s less framing), 6 GB/s from an NVMe disk.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.errors import StartupError

DEVICE_TIER, HOST_TIER, DISK_TIER = "device", "host", "disk"


class Tiers(NamedTuple):
    """Fields of EngineInfo of the same meaning; `blocks` lacks the device's."""

    names: tuple[str, ...]
    blocks: tuple[int, ...]
    ms_per_block: tuple[float, ...]


def tiers(block_bytes: int, *, host: tuple[int, float], disk: tuple[int, float]) -> Tiers:
    """From blocks and GB/s of host memory and disk; a tier of 0 blocks is not there.

    Raises StartupError for numbers that can't be.
    """
    names, blocks, ms_per_block = [DEVICE_TIER], [], [0.0]
    for name, (count, gbps) in ((HOST_TIER, host), (DISK_TIER, disk)):
        if count < 0:
            raise StartupError(f"{name} blocks must be 0 or more, not {count}")
        # Not `<= 0`: that would let NaN pass.
        if not 0 < gbps < float("inf"):
            raise StartupError(f"{name} GB/s must be above 0, not {gbps}")
        if count:
            names.append(name)
            blocks.append(count)
            ms_per_block.append(block_bytes / (gbps * 1e6))
    if not blocks:
        return Tiers((DEVICE_TIER,), (), ())
    return Tiers(tuple(names), tuple(blocks), tuple(ms_per_block))
