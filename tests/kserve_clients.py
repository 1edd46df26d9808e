"""Others' clients of the Open Inference Protocol, each with its own dependencies.

They bring protobuf and grpc of versions of their own, and messages of the same names as
ours, so each lies in a folder of its own beside the test vocabularies, and runs in a
process that sees nothing else. tritonclient is fetched at first use (150 MB unpacked);
kserve (450 MB) only by hand:

    python tests/kserve_clients.py kserve
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from headrace.models.store import models_dir

REQUIREMENTS = {"tritonclient": "tritonclient[grpc]==2.73.0", "kserve": "kserve==0.21.0"}
#: What `folder` fetches by itself.
FETCHED = frozenset({"tritonclient"})


def folder(name: str, *, fetch: bool = False) -> Path | None:
    """Where a client lies; None if it is not here and not to be fetched. Raises RuntimeError
    if it can't be."""
    requirement = REQUIREMENTS[name]
    target = models_dir().parent / "clients" / requirement.replace("[grpc]", "")
    if target.exists():
        return target
    if not fetch and name not in FETCHED:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        staged = Path(temporary) / "staged"
        command = [sys.executable, "-P", "-m", "pip", "install", "-q", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--target", str(staged), requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{requirement} can't be fetched: {done.stderr[-500:]}")
        try:
            staged.rename(target)
        except OSError:
            # Another process was quicker.
            if not target.exists():
                raise
    return target


def command(name: str, script: str, *arguments: str) -> tuple[list[str], dict[str, str]] | None:
    """How to run `script` with the client alone: arguments and environment; None if it is not
    here."""
    path = folder(name)
    if path is None:
        return None
    # No site-packages but the client's own.
    return [sys.executable, "-S", "-P", "-c", script, *arguments], {
        "PYTHONPATH": str(path),
        "HOME": tempfile.gettempdir(),
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(folder(wanted, fetch=True))
