"""Every architecture from a GGUF file: the logits of the `transformers` model it was made of.

The files are written as llama.cpp's converter does: names by the `gguf` library's
own map, rotary pairs of Llama's heads side by side, 1 added to Gemma's norms, experts
stacked. In float32, and with experts and feed-forwards quantized.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from headrace.errors import StartupError
from headrace.models.files import from_path
from services.worker.engines.torch.models import MODELS
from tests.torch_subject import Subject, error, run

from .test_architecture_contract import BASE, CASES, NUM_TOKENS, SCATTERED, make

Arch = gguf.MODEL_ARCH


@dataclass(frozen=True)
class File:
    """A GGUF architecture, the case of the contract that it holds, and further keys."""

    arch: Arch
    case: str
    keys: dict[str, Any] = field(default_factory=dict)


FILES = {
    "llama": File(Arch.LLAMA, "llama"),
    "llama, tied": File(Arch.LLAMA, "llama, tied"),
    "llama, linear rope": File(Arch.LLAMA, "llama, linear rope", {
        "rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    "qwen2": File(Arch.QWEN2, "qwen2"),
    "qwen2, yarn": File(Arch.QWEN2, "qwen2, yarn", {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32}),
    "qwen3": File(Arch.QWEN3, "qwen3"),
    # Its scale is a key of the library that the model of 27 billion does without.
    "gemma3": File(Arch.GEMMA3, "gemma3", {
        "attention.sliding_window": 11, "attention.sliding_window_pattern": 2,
        "attention.scale": 24**-0.5}),
    "phi3": File(Arch.PHI3, "phi3"),
    "phi3, part of a head, window": File(Arch.PHI3, "phi3, part of a head, window", {
        "attention.sliding_window": 13, "rope.dimension_count": 6}),
    "phi3, longrope, long": File(Arch.PHI3, "phi3, longrope, long", {
        "rope.dimension_count": 6, "rope.scaling.original_context_length": 32}),
    "mixtral": File(Arch.LLAMA, "mixtral"),
    "qwen3_moe": File(Arch.QWEN3MOE, "qwen3_moe"),
}  # fmt: skip


def write(path: Path, file: File, model: Any, kind: str = "F32") -> None:
    """The file; feed-forwards of type `kind`."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[file.arch])
    write_keys(writer, file, config)
    names = gguf.get_tensor_name_map(file.arch, config.num_hidden_layers)
    for name, weight in tensors(file, model):
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        values = weight.detach().numpy()
        if ".mlp." in name and values.shape[-1] % 32 == 0 and kind != "F32":
            quant = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(found, gguf.quants.quantize(values, quant), raw_dtype=quant)
        else:
            writer.add_tensor(found, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_keys(writer: gguf.GGUFWriter, file: File, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or 8
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if size := getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(size)
    writer.add_eos_token_id(2)
    for key, value in file.keys.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](f"{gguf.MODEL_ARCH_NAMES[file.arch]}.{key}", value)
    if "longrope" in file.case:
        for which in ("long", "short"):
            values = np.array(rope[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", values)


def tensors(file: File, model: Any) -> list[tuple[str, torch.Tensor]]:
    """Names as in transformers, arrangement as in llama.cpp."""
    found = []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if file.arch == Arch.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = model.config.hidden_size // model.config.num_attention_heads
            halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if file.arch == Arch.GEMMA3 and name.endswith("norm.weight"):
            weight = weight + 1
        if name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, 1)
            stem = name.removesuffix("gate_up_proj")
            found += [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
        elif name.endswith("experts.down_proj"):
            found.append((f"{name}.weight", weight))
        else:
            found.append((name, weight))
    return found


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_logits(transformers: Any, tmp_path: Path, file: File) -> None:
    case = CASES[file.case]
    model = make(transformers, case)
    write(tmp_path / "tiny.gguf", file, model)
    tokens = torch.randint(0, BASE["vocab_size"], (NUM_TOKENS,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]

    subject = Subject(from_path(tmp_path / "tiny.gguf"))

    assert subject.args.architecture == case.architecture
    found = subject.logits(subject.runner(), run(tokens, 0, NUM_TOKENS, SCATTERED))
    assert error(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "mixtral", "qwen3_moe"])
def test_quantized_feed_forwards(transformers: Any, tmp_path: Path, name: str) -> None:
    """Experts are read one by one out of one quantized tensor; logits stay near."""
    file = FILES[name]
    model = make(transformers, CASES[file.case], hidden_size=64, num_attention_heads=8,
                 intermediate_size=96)  # fmt: skip
    with torch.no_grad():
        # What 8 bits hold exactly: whole steps, the largest of each row 127.
        for name_, weight in model.named_parameters():
            if ".mlp." in name_ and weight.shape[-1] % 32 == 0:
                weight.copy_((weight * 127 / 0.8).round().clamp(-127, 127) / 128)
                weight[..., ::32] = 127 / 128
    write(tmp_path / "tiny.gguf", file, model, "Q8_0")
    tokens = torch.randint(0, BASE["vocab_size"], (40,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    subject = Subject(from_path(tmp_path / "tiny.gguf"))
    found = subject.logits(subject.runner(), run(tokens, 0, 40, SCATTERED))
    assert error(found, expected) < 1e-4


def test_all_but_mistral_are_here() -> None:
    """Its files say that they are Llama."""
    assert {CASES[file.case].architecture for file in FILES.values()} == set(MODELS) - {"mistral"}


BAD_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "rope type": ({"rope.scaling.type": "magic"}, "rope type 'magic' is not supported"),
    "part of a head": ({"rope.dimension_count": 4}, "rope.dimension_count 4 of 8 is not"),
    "no factors": ({"rope.scaling.type": "longrope"}, "there is no rope_factors_long.weight"),
    "values apart": ({"attention.value_length": 4}, "value_length is not key_length 8"),
}


@pytest.mark.parametrize(("keys", "text"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_what_a_file_cannot_mean_is_refused(
    transformers: Any, tmp_path: Path, keys: dict[str, Any], text: str
) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    config = make(transformers, CASES["llama"]).config
    write_keys(writer, File(Arch.LLAMA, "llama", {}), config)
    for key, value in keys.items():
        writer.kv_data[0].pop(f"llama.{key}", None)
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartupError, match=r"tiny\.gguf: ") as caught:
        Subject(from_path(tmp_path / "tiny.gguf"))
    assert text in str(caught.value)


def test_an_unknown_architecture_is_refused_with_those_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartupError, match=r"'mamba' is unknown; there are llama, qwen2, qwen3"):
        Subject(from_path(tmp_path / "tiny.gguf"))
