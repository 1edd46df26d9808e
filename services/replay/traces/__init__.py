"""Trace formats: one file each behind one table.

    trace = load("traces/conversation.jsonl", TraceOptions(limit=1000))
    trace = load("synthetic:requests=2000,rate=5,turns=4", TraceOptions())

A reader turns a source into a `Trace` and knows neither workers nor policies. What
can't be read is a StartupError that names file, line, field and value.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import StartupError
from services.replay.traces.base import SYNTHETIC, TraceOptions, first_line

if TYPE_CHECKING:
    from services.replay.traces.base import TraceReader
    from services.replay.workload import Trace

__all__ = ["FORMATS", "SYNTHETIC", "TraceOptions", "load"]

#: Readers by name. Formats are recognized in this order.
FORMATS = {
    "mooncake": "services.replay.traces.mooncake:Mooncake",
    "azure": "services.replay.traces.azure:Azure",
    "sessions": "services.replay.traces.sessions:Sessions",
    "synthetic": "services.replay.traces.synthetic:Synthetic",
}


def load(source: str, options: TraceOptions) -> Trace:
    """The trace in the file `source`, or the one that `synthetic:…` describes.

    `options.format` "" means whatever recognizes the source. Raises StartupError.
    """
    if options.format:
        if options.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise StartupError(f"trace format must be one of {known}, not {options.format!r}")
        return _reader(options.format).read(source, options)
    line = source if source.startswith(SYNTHETIC) else first_line(Path(source))
    for name in FORMATS:
        reader = _reader(name)
        if reader.recognizes(line):
            return reader.read(source, options)
    shown = line if len(line) <= 80 else line[:80] + "…"
    raise StartupError(
        f"{source}:1: no trace format begins like this: {shown!r}; "
        f"--format names one of {', '.join(FORMATS)}"
    )


def _reader(name: str) -> TraceReader:
    module, _, attribute = FORMATS[name].partition(":")
    reader: TraceReader = getattr(import_module(module), attribute)()
    return reader
