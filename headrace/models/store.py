"""The model cache on this machine, and what names mean.

    models_dir()/<name>/…            a model's files, whole or not there
    models_dir()/<name>/model.json   where they came from (Manifest)
    models_dir()/.staging/<name>/    what a pull has so far

A pull works in the staging folder, which it holds locked, and moves the finished
folder into place with one rename. It knows no network.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.errors import StartupError
from headrace.models.catalog import CATALOG
from headrace.models.files import ModelFiles, from_path, is_model_name

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "model.json"
HUB_PREFIX = "hf:"
_STAGING = ".staging"
_MAX_DEPTH = 2


class FileRecord(msgspec.Struct, frozen=True):
    """A pulled file: bytes, and its sha256 in hex."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a pull leaves beside the files."""

    name: str
    source: str
    files: tuple[FileRecord, ...]
    licence: str = ""
    revision: str = ""


def models_dir() -> Path:
    """Where pulled models lie: `$HEADRACE_MODELS`, or `headrace/models` in the user's cache."""
    if chosen := os.environ.get("HEADRACE_MODELS"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "headrace" / "models"


def resolve(spec: str) -> ModelFiles:
    """The files of what a user wrote: a pulled model's name, a path, or NAME=PATH.

    `hf:OWNER/NAME[@REV]` means the pulled OWNER/NAME. Raises StartupError, saying
    how to pull it, if it is not on this machine.
    """
    name, has_name, path = spec.partition("=")
    if has_name:
        return from_path(Path(path).expanduser(), name)
    pulled_name = spec.removeprefix(HUB_PREFIX).partition("@")[0]
    pulled = models_dir() / pulled_name
    if is_model_name(pulled_name) and pulled.exists():
        return from_path(pulled, pulled_name)
    if (os.sep in spec and not spec.startswith(HUB_PREFIX)) or Path(spec).exists():
        return from_path(Path(spec).expanduser())
    if spec in CATALOG or spec.startswith(HUB_PREFIX):
        raise StartupError(
            f"model {spec!r} is not on this machine; fetch it with `headrace models pull {spec}`"
        )
    raise StartupError(
        f"model {spec!r} is not on this machine, and no catalog name ({', '.join(CATALOG)}); "
        "pull it with `headrace models pull hf:OWNER/NAME`, or give a path or NAME=PATH"
    )


def pulled_models() -> list[ModelFiles]:
    """All models in the cache, by name."""
    found = []
    for folder in _model_folders(models_dir(), _MAX_DEPTH):
        name = folder.relative_to(models_dir()).as_posix()
        try:
            found.append(from_path(folder, name))
        except StartupError:
            # Something else that lies there is no reason not to show the rest.
            continue
    return found


def read_manifest(model: ModelFiles) -> Manifest | None:
    """Where a model came from, if a pull brought it."""
    folder = model.path.parent if model.format == "gguf" else model.path
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put `manifest` beside the files in `folder`."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    temporary = folder / f".{MANIFEST}"
    temporary.write_bytes(text + b"\n")
    temporary.replace(folder / MANIFEST)


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def installed_size(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


@contextmanager
def staging(name: str) -> Iterator[Path]:
    """The folder that the one pull of `name` works in; what it held before is still there.

    Raises StartupError if another process pulls it now, or the cache can't be written.
    """
    root = models_dir() / _STAGING
    folder = root / name.replace("/", "--")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise StartupError(
            f"can't write to the model cache {models_dir()}: {error.strerror}; "
            "choose another with HEADRACE_MODELS"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"another process is pulling {name} now; wait for it") from error
        try:
            yield folder
        finally:
            with suppress(OSError):
                # Kept if a pull is to go on with what lies in it.
                folder.rmdir()


def install(folder: Path, name: str) -> Path:
    """Move a finished `folder` into the cache as `name`, in place of what is there."""
    target = models_dir() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        folder.rename(target)
        shutil.rmtree(old)
    else:
        folder.rename(target)
    return target


def _model_folders(root: Path, depth: int) -> Iterator[Path]:
    if not root.is_dir():
        return
    for folder in sorted(root.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if any(p.is_file() for p in folder.iterdir()):
            yield folder
        elif depth > 1:
            yield from _model_folders(folder, depth - 1)
