"""What a stream that is open and silent costs in memory."""

from __future__ import annotations

import json
import re
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from .load import Shape
    from .processes import Processes

_WAIT_S = 60.0
_TOKEN = b'"delta":{"content":'


def memory_per_stream(processes: Processes, shape: Shape, num_streams: int) -> float:
    """kB that the processes between clients and workers grew by, for each open stream.

    A few were there before, so that what is made once is there. Streams are silent
    after their first token if a decode step takes long enough.
    """
    _open_and_close(processes, shape, num_streams)
    before = _private_kb(processes)
    streams = _open(processes, shape, num_streams)
    after = _private_kb(processes)
    for stream in streams:
        stream.close()
    return (after - before) / num_streams


def _open_and_close(processes: Processes, shape: Shape, num_streams: int) -> None:
    for stream in _open(processes, shape, num_streams // 10):
        stream.close()


def _open(processes: Processes, shape: Shape, num_streams: int) -> list[socket.socket]:
    """Streams that have each had a token."""
    host, _, port = processes.http.rpartition(":")
    streams = []
    for number in range(num_streams):
        stream = socket.create_connection((host, int(port)), timeout=_WAIT_S)
        stream.sendall(_request(shape, number))
        streams.append(stream)
    waiting = {stream.fileno(): stream for stream in streams}
    heard = dict.fromkeys(waiting, b"")
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], _WAIT_S)
        if not ready:
            raise RuntimeError(f"{len(waiting)} of {num_streams} streams brought no token")
        for number in ready:
            data = waiting[number].recv(1 << 16)
            heard[number] += data
            if not data or b"HTTP/1.1 200" not in heard[number]:
                raise RuntimeError(f"a stream failed: {heard[number][:300]!r}")
            if _TOKEN in heard[number]:
                del waiting[number]
    return streams


def _request(shape: Shape, number: int) -> bytes:
    body = json.dumps(
        {
            "model": shape.model,
            "messages": [{"role": "user", "content": f"{number} ".ljust(shape.prompt_len, "w")}],
            "max_tokens": shape.num_tokens,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _private_kb(processes: Processes) -> float:
    """Memory that is the processes' own, their children's with it."""
    total = 0
    for name in processes.edge:
        parent = psutil.Process(processes.processes[name].pid)
        for process in (parent, *parent.children(recursive=True)):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += sum(int(kb) for kb in re.findall(r"Private_\w+: *(\d+) kB", text))
    return total
