"""The torch engine runs where only torch, numpy and this checkout are: on a bare GPU machine.

A process that refuses every other import loads a model and generates; that gguf is
needed for GGUF files alone follows from it.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.unit.torch_engine.conftest import TINY, tiny_tensors, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import sys
import numpy, torch
torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
# What torch itself needs, some of it late.
WITH_TORCH = {name.partition(".")[0] for name in sys.modules} | {"triton", "torch", "torchgen",
    "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock",
    "typing_extensions", "setuptools", "pkg_resources", "_distutils_hack", "cuda", "nvidia",
    "optree", "pytest", "scipy", "pandas", "yaml", "dill", "expecttest"}
OURS = {"headrace", "services"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | WITH_TORCH | OURS:
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refuse())
"""
GENERATE = """
from headrace.blocks import namespace_key
from headrace.params import SamplingParams
from services.worker.engine import EngineConfig, SequenceRequest
from services.worker.engines.torch.engine import TorchEngine

engine = TorchEngine(EngineConfig(sys.argv[1], "tiny", num_threads=1, num_blocks=8),
                     lambda *_: None)
params = SamplingParams(temperature=0.0, seed=0, max_tokens=4, ignore_eos=True)
engine.submit([SequenceRequest(0, [3, 4, 5], [], params, namespace_key("tiny"))])
count = 0
while engine.has_work():
    count += len(engine.step().token_ids)
print(count)
"""


def test_nothing_but_torch_and_numpy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    write_safetensors(tmp_path / "model.safetensors", tiny_tensors())
    done = subprocess.run(
        [sys.executable, "-c", BARE + GENERATE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4"]


def test_gpu_tests_need_nothing_more_but_pytest() -> None:
    """As on a GPU machine with a checkout: without a GPU they say so, and nothing fails."""
    code = BARE.replace("import numpy, torch", "import numpy, pytest, torch") + (
        'OURS |= {"tests", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"}\n'
        'cases = "tests/unit/torch_engine/test_cuda.py"\n'
        "sys.exit(pytest.main(['-c', '/dev/null', '--rootdir', '.', '-rs', '-p',\n"
        "    'no:cacheprovider', '--import-mode', 'importlib', cases]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert torch.cuda.is_available() or "no GPU: torch.cuda.is_available() is false" in done.stdout


def test_imports_by_name() -> None:
    """What files of the engine import, lazily too: gguf in one place."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "services/worker/engines/torch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for top in {name.partition(".")[0] for name in names}:
                if top not in sys.stdlib_module_names | {"services", "headrace", "torch", "numpy"}:
                    found.setdefault(top, set()).add(path.name)
    assert found.pop("gguf") == {"gguf.py"}
    # Of CUDA builds of torch, where kernels are written in it.
    found.pop("triton", None)
    assert not found
