"""The model cache on this machine, and what names mean."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.errors import StartupError
from headrace.models.files import ModelFiles, from_path


def models_dir() -> Path:
    """Where pulled models lie: `$HEADRACE_MODELS`, or `headrace/models` in the user's cache."""
    if chosen := os.environ.get("HEADRACE_MODELS"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "headrace" / "models"


def resolve(spec: str) -> ModelFiles:
    """The files of what a user wrote: a pulled model's name, a path, or NAME=PATH.

    Raises StartupError, saying how to pull it, if it is not on this machine.
    """
    name, has_name, path = spec.partition("=")
    if has_name:
        return from_path(Path(path).expanduser(), name)
    pulled = models_dir() / spec
    if pulled.exists():
        return from_path(pulled, spec)
    if os.sep in spec or Path(spec).exists():
        return from_path(Path(spec).expanduser())
    raise StartupError(
        f"model {spec!r} is not on this machine; fetch it with `headrace models pull {spec}`"
    )
