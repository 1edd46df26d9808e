"""Compiles the kernels for this CPU, once per source, compiler and CPU.

The library is kept in `$HEADRACE_KERNELS`, or `headrace/kernels` in the user's
cache. It knows no kernel.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
#: A build takes 3 s.
_TIMEOUT_S = 120


def library() -> Path | None:
    """The compiled library; None, and a line in the log, where there is no compiler."""
    compiler = _compiler()
    if compiler is None:
        _log.warning("no C compiler (cc, gcc, clang): the CPU engine is several times slower")
        return None
    folder = _folder()
    path = folder / f"{_key(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _build(compiler, path)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _log.warning("can't compile the CPU kernels, the engine is slower: %s", output)
        return None
    return path


def _compiler() -> str | None:
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _folder() -> Path:
    if chosen := os.environ.get("HEADRACE_KERNELS"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "headrace" / "kernels"


def _key(compiler: str) -> str:
    """What the library depends on. A folder may be shared by machines with other CPUs."""
    real = Path(compiler).resolve()
    parts = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), torch.__version__.encode()]
    parts.append(f"{real} {real.stat().st_size} {platform.machine()}".encode())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    about = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    parts += [line.encode() for line in dict.fromkeys(lines) if line.startswith(about)]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _build(compiler: str, path: Path) -> None:
    """Compile beside `path`, then move there: several processes may start at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unlinked, built = f"{folder}/kernels.o", f"{folder}/kernels.so"
        _run([compiler, *_FLAGS, "-c", str(_SOURCE), "-o", unlinked])
        # Torch's own OpenMP: a second one would keep threads of its own spinning.
        torch_lib = Path(torch.__file__).parent / "lib"
        openmp = [str(found) for found in sorted(torch_lib.glob("libgomp*.so*"))[:1]]
        _run([compiler, "-shared", unlinked, *(openmp or ["-fopenmp"]), "-lm", "-o", built])
        Path(built).replace(path)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
