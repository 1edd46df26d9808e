"""The CPU's kernels against torch, and that a row's result does not depend on the others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from services.worker.engines.torch.kernels import compiler, kernels

if TYPE_CHECKING:
    from pathlib import Path

    from services.worker.engines.torch.kernels import Kernels


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip("needs a C compiler")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "k"), [(1, 8), (70, 48), (200, 7), (16 * 13 + 5, 600)])
def test_linear(compiled: Kernels, dtype: torch.dtype, columns: int, k: int) -> None:
    weight, x = torch.randn(columns, k).to(dtype), torch.randn(150, k)
    packed = compiled.pack(weight)
    whole = compiled.linear(x, packed)
    torch.testing.assert_close(whole, F.linear(x, weight.float()), rtol=1e-4, atol=1e-4)
    for rows in (*range(1, 15), 31, 64, 149):
        assert torch.equal(compiled.linear(x[:rows], packed), whole[:rows])
        assert torch.equal(compiled.linear(x[-rows:], packed), whole[-rows:])


def test_linear_takes_rows_with_a_stride(compiled: Kernels) -> None:
    weight, wide = torch.randn(20, 16), torch.randn(9, 40)
    x = wide[:, 8:24]
    torch.testing.assert_close(compiled.linear(x, compiled.pack(weight)), F.linear(x, weight))


def test_rms_norm(compiled: Kernels) -> None:
    x, weight = torch.randn(70, 576), torch.randn(576)
    whole = compiled.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(whole, F.rms_norm(x, (576,), weight, 1e-5))
    assert torch.equal(compiled.rms_norm(x[5:6], weight, 1e-5), whole[5:6])


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gates(compiled: Kernels, scale: float) -> None:
    x = torch.randn(40, 2 * 104) * scale
    gate, up = x.chunk(2, 1)
    silu, gelu = compiled.gate(x, "silu"), compiled.gate(x, "gelu_tanh")
    torch.testing.assert_close(silu, F.silu(gate) * up, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gelu, F.gelu(gate, approximate="tanh") * up, rtol=1e-5, atol=1e-4 * scale
    )


@pytest.mark.parametrize("compiler_name", ["", "/nowhere/cc"])
def test_does_without_a_compiler(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler_name: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", compiler_name)
    with caplog.at_level(logging.WARNING):
        assert compiler.library() is None
    assert "no C compiler" in caplog.text


@pytest.mark.parametrize("script", ["#!/bin/sh\necho broken >&2\nexit 1\n", "not a program"])
def test_does_without_a_compiler_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    fake = tmp_path / "cc"
    fake.write_text(script)
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("HEADRACE_KERNELS", str(tmp_path / "kernels"))
    with caplog.at_level(logging.WARNING):
        assert compiler.library() is None
    assert "can't compile" in caplog.text
    assert not list((tmp_path / "kernels").iterdir())


def test_compiles_once(compiled: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KERNELS", str(tmp_path))
    path = compiler.library()
    assert path is not None
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    built = path.stat()
    assert compiler.library() == path
    assert path.stat().st_ino == built.st_ino
