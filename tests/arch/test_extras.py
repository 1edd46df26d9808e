"""Each service installs alone, by its own extra, and starts with nothing else there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ["gateway", "tokenizer", "router", "worker", "replay"]
#: One of these is in each one's help.
FLAGS = ("--listen", "--http", "--workers")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_alone(service: str, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, f"{ROOT}[{service}]"], check=True)
    done = subprocess.run(
        [python, "-m", f"services.{service}", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert any(flag in done.stdout for flag in FLAGS)
    listed = subprocess.run(
        [python, "-m", "pip", "list"], capture_output=True, text=True, check=True
    ).stdout
    assert ("torch" in listed.split()) == (service == "worker")
