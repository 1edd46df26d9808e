"""`headrace bench` as a user runs it, against a mesh of sim workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.mesh import Mesh

SHORT = ("--requests", "12", "--output-tokens", "8", "--input-tokens", "30", "--warmup", "1")


def bench(mesh: Mesh, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON, and what was printed."""
    path = folder / "out.json"
    done = mesh.command("bench", *arguments, *SHORT, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    parsed: dict[str, Any] = json.loads(path.read_text())
    return parsed, done.stdout


@pytest.mark.parametrize("edge", ["grpc", "http"])
def test_levels_against_either_edge(sim_mesh: Mesh, tmp_path: Path, edge: str) -> None:
    target = f"grpc://{sim_mesh.grpc}" if edge == "grpc" else f"{sim_mesh.url}/v1"
    picture = tmp_path / "load.png"
    found, printed = bench(
        sim_mesh, tmp_path, target, "--concurrency", "1,4", "--plot", str(picture)
    )
    assert [level["load"] for level in found["levels"]] == [1, 4]
    for level in found["levels"]:
        assert (level["succeeded"], level["errors"], level["output_tokens"]) == (12, {}, 96)
        assert level["ttft_s"]["count"] == level["latency_s"]["count"] == 12
        assert 0 < level["ttft_s"]["p50"] <= level["latency_s"]["p99"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "TTFT" in printed
    assert "12 of 12 requests" in printed


def test_the_running_mesh_is_the_target_and_shared_prefixes_are_found(
    sim_mesh: Mesh, tmp_path: Path
) -> None:
    found, _ = bench(
        sim_mesh,
        tmp_path,
        *("--state-dir", str(sim_mesh.state), "--rate", "50", "--arrival", "constant"),
        *("--shared-prefix-tokens", "400"),
    )
    (level,) = found["levels"]
    assert found["target"] == f"grpc://{sim_mesh.grpc}"
    assert level["mode"] == "open"
    assert level["cached_tokens"] > level["prompt_tokens"] / 3


def test_what_is_wrong_is_one_line(sim_mesh: Mesh, tmp_path: Path) -> None:
    none = sim_mesh.command("bench", "http://127.0.0.1:1/v1")
    assert none.returncode == 1
    assert none.stderr.startswith("Error: nothing answers at http://127.0.0.1:1/v1")
    both = sim_mesh.command("bench", "--rate", "1", "--concurrency", "1")
    assert "not both" in both.stderr
    lost = sim_mesh.command("bench", "--trace", str(tmp_path / "none.jsonl"))
    assert "--trace" in lost.stderr
    wrong = sim_mesh.command(
        "bench", f"grpc://{sim_mesh.grpc}", "--model", "other", "--requests", "2"
    )
    assert wrong.returncode == 1
    assert "NOT_FOUND" in wrong.stdout
