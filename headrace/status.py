"""What a process is doing while others wait for it: a phase and a fraction.

A service started by `headrace up` finds a path in `HEADRACE_STATUS_FILE` and
keeps one line there; the supervisor shows it. Without the variable nothing is
written. Also the last words of a service that can't start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "HEADRACE_STATUS_FILE"

#: The phase in which a service reports why it could not start.
FAILED = "failed"
READY = "ready"


@dataclass(frozen=True, slots=True)
class Progress:
    """`phase` is for people ("loading weights"); `fraction` is in [0, 1] or unknown."""

    phase: str
    fraction: float | None = None


def report(phase: str, fraction: float | None = None) -> None:
    """Replace this process's line. Cheap, but not for every tensor of a large model."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    temporary = f"{path}.{os.getpid()}"
    done = "" if fraction is None else f"{fraction:.4f}"
    Path(temporary).write_text(f"{done}\t{phase}\n")
    Path(temporary).replace(path)


def read(path: Path) -> Progress | None:
    """What the process that owns `path` last said, if anything."""
    try:
        done, _, phase = path.read_text().rstrip("\n").partition("\t")
    except FileNotFoundError:
        return None
    return Progress(phase, float(done) if done else None)
