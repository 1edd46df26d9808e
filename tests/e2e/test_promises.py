"""What the running mesh must be: free of Rust, free of torch where it has no business."""

from __future__ import annotations

import mmap
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.mesh import Mesh

RUST_MARKS = (b"/rustc/", b"rustc version ")


def libraries(pid: int) -> set[Path]:
    """Shared libraries and executables mapped by a process."""
    paths = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
            paths.add(Path(fields[5]))
    return paths


def built_with_rust(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(mark) >= 0 for mark in RUST_MARKS)


def processes(mesh: Mesh) -> dict[str, list[int]]:
    """Every process of the mesh with its descendants, by name."""
    found = {}
    for process in mesh.status()["processes"]:
        tree = psutil.Process(process["pid"])
        found[process["name"]] = [tree.pid, *(c.pid for c in tree.children(recursive=True))]
    return found


@pytest.fixture(scope="module")
def exercised(torch_mesh: Mesh) -> dict[str, list[int]]:
    """The mesh's processes after a request over each edge, so that lazy imports are in."""
    client = openai.OpenAI(base_url=f"{torch_mesh.url}/v1", api_key="none")
    client.chat.completions.create(
        model="smollm2-135m", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
    )
    done = torch_mesh.command("chat", "Hi", "--max-tokens", "3", "--address", torch_mesh.grpc)
    assert done.returncode == 0, done.stderr
    return processes(torch_mesh)


def test_the_detector_finds_rust() -> None:
    import tokenizers

    library = next(Path(tokenizers.__file__).parent.glob("*.so"))
    assert built_with_rust(library)


def test_no_service_loads_a_library_built_with_rust(exercised: dict[str, list[int]]) -> None:
    checked: dict[Path, bool] = {}
    for name, pids in exercised.items():
        for path in set().union(*(libraries(pid) for pid in pids)):
            if path not in checked:
                checked[path] = built_with_rust(path)
            assert not checked[path], f"{name} loads {path}"
    assert len(checked) > 50


def test_only_the_engine_loads_torch(exercised: dict[str, list[int]]) -> None:
    def has_torch(pid: int) -> bool:
        return any(path.name.startswith("libtorch") for path in libraries(pid))

    with_torch = {name for name, pids in exercised.items() if any(map(has_torch, pids))}
    assert with_torch == {"worker-0", "worker-1"}
    assert not has_torch(exercised["worker-0"][0]), "the worker's own process has no torch"
