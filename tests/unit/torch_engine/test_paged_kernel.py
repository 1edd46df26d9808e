"""The Triton kernel, interpreted on a CPU and compiled where a GPU is: paged_kernel_cases.py.

Triton decides at its import whether it interprets, hence the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_in_a_process() -> None:
    pytest.importorskip("triton", reason="this platform has no Triton")
    cases = Path(__file__).with_name("paged_kernel_cases.py")
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | interpret, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
