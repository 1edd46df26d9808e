"""The house's rules that a tool can hold: `make check`, as tests."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        [str(BIN / "lint-imports")],
        [str(BIN / "buf"), "lint"],
        [sys.executable, "scripts/gen_protos.py", "--check"],
        [str(BIN / "ruff"), "check", "."],
        [str(BIN / "ruff"), "format", "--check", "."],
        [str(BIN / "mypy")],
    ],
    ids=lambda command: " ".join(Path(word).name for word in command),
)
def test_a_check_passes(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nobody_else_ships_our_packages() -> None:
    owners = packages_distributions()
    assert set(owners["services"]) == {"headrace"}
    assert set(owners["headrace"]) == {"headrace"}
