"""SmolLM2 as Hugging Face lays a model out, made of the GGUF file that we have: no weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from headrace.models.gguf_file import GgufFile
from headrace.models.store import resolve
from services.worker import model_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MODEL = "smollm2-135m"
#: Its pre-tokenizer, as its tokenizer.json has it; the GGUF file only names it.
_PRE_TOKENIZER = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]
_CONTROL, _USER_DEFINED = 3, 4


def write_tokenizer(folder: Path) -> Path:
    """`folder`, with tokenizer.json in it."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = GgufFile(resolve(MODEL).path).metadata
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(metadata)))
    return folder


def write_model(folder: Path) -> Path:
    """`folder`, with all that a server reads of a model but its weights."""
    write_tokenizer(folder)
    files = resolve(MODEL)
    metadata = GgufFile(files.path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    bos, eos = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    args = model_config.read(files)
    contents: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": args.vocab_size, "hidden_size": args.hidden_size,
            "intermediate_size": args.intermediate_size, "num_hidden_layers": args.num_layers,
            "num_attention_heads": args.num_heads, "num_key_value_heads": args.num_kv_heads,
            "head_dim": args.head_dim, "hidden_act": "silu", "rms_norm_eps": args.rms_norm_eps,
            "max_position_embeddings": args.context_len, "rope_theta": args.rope.theta,
            "tie_word_embeddings": args.tie_embeddings, "torch_dtype": "bfloat16",
            "bos_token_id": bos, "eos_token_id": eos,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": args.context_len,
            "bos_token": tokens[bos], "eos_token": tokens[eos],
            "chat_template": metadata["tokenizer.chat_template"],
        },
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": at, "content": token, "special": kind == _CONTROL, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for at, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZER},
        "decoder": _PRE_TOKENIZER[1],
        "model": {
            "type": "BPE",
            "vocab": {token: at for at, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
