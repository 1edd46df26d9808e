"""The shape of a decoder, as plain data. It knows no file format and no tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends, where it is not plain causal attention.

    scores = soft_cap · tanh(scale · q kᵀ / soft_cap); a query sees the last
    `window` positions, its own among them.
    """

    #: None: all positions up to the query's own.
    window: int | None = None
    #: None: 1 / sqrt(head_dim).
    scale: float | None = None
    #: None: scores are not capped.
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of the first `rotary_dim` elements of a head.

    `kind` is an entry of layers/rope_frequencies.py, which says what it does with
    which of the other fields; those that a kind does not use keep their defaults.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    #: Tokens that the model was first trained for, before its context was stretched.
    original_context_len: int = 0
    #: What cosines and sines are multiplied by; None: as the kind's source says.
    attention_factor: float | None = None
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # longrope, factors: what each frequency is divided by
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """A feed-forward of experts, of which each token uses some."""

    num_experts: int
    num_experts_per_token: int
    #: Each expert's feed-forward size.
    intermediate_size: int
    #: The chosen experts' weights are made to sum to 1.
    normalize: bool
    #: Layers with one feed-forward for all tokens.
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attention has `num_heads` query heads of `head_dim`, in groups that share one
    of `num_kv_heads` key and value heads.
    """

    architecture: str
    vocab_size: int
    #: Longest sequence, in tokens, that the model was made for.
    context_len: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    #: The output projection is the embedding.
    tie_embeddings: bool
    #: Tokens that end an answer; may be empty.
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    #: One a layer.
    attention: tuple[LayerAttention, ...]
    #: Of layers with a window, where it differs from `rope`.
    local_rope: RopeConfig | None = None
    experts: ExpertConfig | None = None
    #: logits = final_soft_cap · tanh(logits / final_soft_cap).
    final_soft_cap: float | None = None

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that the KV cache keeps for a token, of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
