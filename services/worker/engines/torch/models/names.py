"""Names of tensors in files, as models call them: Hugging Face's, less `.weight`.

Each architecture has its tables beside its code; here is what applies them. A `*`
in a model's name stands for the outermost dimension of one tensor that holds the
weights of all experts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

#: GGUF's names of what is not in a block, and ours.
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
#: What model_config has read, or no model uses.
_GGUF_UNUSED = ("rope_freqs", "rope_factors_long", "rope_factors_short")
#: Of a block, in most architectures.
GGUF_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GGUF_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}


class Naming:
    """Hugging Face's names: ours, with an ending."""

    def __init__(self, *, tied: bool) -> None:
        self._tied = tied

    def rename(self, name: str) -> str | None:
        """Our name of a checkpoint's tensor; None for one that the model does without."""
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if name == "lm_head.weight" and self._tied:
            return None
        return name.removesuffix(".weight")

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """Rearrange, in place, a weight of which we have the name, into our order."""


class GgufNaming(Naming):
    """GGUF's names, by a table of those of a block.

    `permuted_heads` is the head size of files with llama.cpp's order of rotary
    pairs: it keeps elements i and i + D/2 of a query's or key's head side by side.
    """

    def __init__(self, block_names: Mapping[str, str], *, permuted_heads: int = 0) -> None:
        super().__init__(tied=False)
        self._block_names = block_names
        self._permuted_heads = permuted_heads

    def rename(self, name: str) -> str | None:
        """An unknown name stays itself, so that an error about it can be read."""
        stem, _, ending = name.rpartition(".")
        if ending not in ("weight", "bias"):
            return name
        if stem in _GGUF_UNUSED:
            return None
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        ours = _GGUF_NAMES.get(stem)
        if match and match[2] in self._block_names:
            ours = f"model.layers.{match[1]}.{self._block_names[match[2]]}"
        if ours is None:
            return name
        return ours if ending == "weight" else f"{ours}.bias"

    def restore(self, name: str, weight: torch.Tensor) -> None:
        """See Naming.restore."""
        if self._permuted_heads and name.endswith(("q_proj", "k_proj")):
            pairs = weight.view(-1, self._permuted_heads // 2, 2, weight.shape[1])
            weight.copy_(pairs.transpose(1, 2).reshape(weight.shape))
