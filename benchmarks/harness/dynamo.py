"""Dynamo in an environment of its own, and its offline replay of a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DYNAMO = "1.6.1"
#: Its wheels ask for a package that is not published, and for much that is not needed here.
_WHEELS = (f"ai-dynamo=={DYNAMO}", f"ai-dynamo-runtime=={DYNAMO}")
_NEEDED = (
    *("msgspec", "pyyaml", "uvloop", "packaging", "pyzmq"),
    *("prometheus-client<1", "pydantic<=2.13.5"),
)
_SIDE = Path(__file__).with_name("dynamo_side.py")


def install(folder: Path) -> Path:
    """The Python of an environment with Dynamo, made if it is not there yet."""
    python = folder / "bin" / "python"
    if python.exists() and _version(python) == DYNAMO:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", *_WHEELS], check=True)
    subprocess.run([*pip, *_NEEDED], check=True)
    if _version(python) != DYNAMO:
        raise RuntimeError(f"Dynamo {DYNAMO} can't be imported in {folder}")
    return python


def _version(python: Path) -> str:
    """The version that can be imported, or "" if none can."""
    asked = (
        "from importlib.metadata import version; import dynamo.replay; print(version('ai-dynamo'))"
    )
    done = subprocess.run(
        [python, "-c", asked], env=_environment(), capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


@dataclass(frozen=True)
class ReplayJob:
    """What Dynamo's replay is asked for. `router_mode`: "round_robin" or "kv_router"."""

    trace: str
    router_mode: str
    speed: float
    num_workers: int
    num_blocks: int
    block_size: int
    #: Tokens that a hash id of the trace stands for.
    trace_block_size: int


def replay(python: Path, job: ReplayJob) -> dict[str, Any]:
    """The summary that Dynamo prints of a replay: times in ms.

    Raises RuntimeError with what it said, if it fails or leaves requests unfinished.
    """
    done = subprocess.run(
        # -P: this folder's modules must not stand in for the standard library's.
        [python, "-P", _SIDE, json.dumps(asdict(job))],
        env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"Dynamo's replay failed: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["completed_requests"] != found["num_requests"]:
        raise RuntimeError(
            f"Dynamo completed {found['completed_requests']} of {found['num_requests']} requests"
        )
    return found


def _environment() -> dict[str, str]:
    """Ours, without what our own processes are told by it. Its log says every choice else."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    return kept | {"DYN_LOG": "error"}
