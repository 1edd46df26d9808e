"""The JSON file of a replay: what was asked, what came of it, and apart what this run cost.

All but `run` is a function of the options, so that files of two runs compare.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import headrace
from headrace.errors import StartupError
from services.replay.report import as_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.replay.report import Report
    from services.replay.traces import TraceOptions
    from services.replay.workload import Trace


def document(
    source: str,
    trace: Trace,
    trace_options: TraceOptions,
    reports: Sequence[Report],
    cost: dict[str, float],
) -> dict[str, Any]:
    """The JSON file. All but `run` is equal for equal options."""
    requests = trace.requests
    return {
        "trace": {
            "source": source,
            **dataclasses.asdict(trace_options),
            "block_size": trace.block_size,
            "requests": len(requests),
            "prompt_tokens": sum(request.num_tokens for request in requests),
            "output_tokens": sum(request.output_tokens for request in requests),
            "duration_s": requests[-1].arrival_ms / 1000,
        },
        "replays": [as_json(report) for report in reports],
        "run": {
            **cost,
            "headrace": headrace.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def write(path: str, content: dict[str, Any]) -> None:
    """Write `content` into the file `path`, or to stdout for "-". Raises StartupError."""
    text = json.dumps(content, indent=1, allow_nan=False)
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path} can't be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raises StartupError: a replay of minutes must not end in a file that can't be written."""
    folder = path.absolute().parent
    if not os.access(path if path.exists() else folder, os.W_OK) or path.is_dir():
        raise StartupError(f"{path} can't be written: is {folder} there, and yours to write in?")
