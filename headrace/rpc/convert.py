"""Types of the shared library as protos, and back. Nothing else."""

from __future__ import annotations

from headrace.params import SamplingParams
from headrace.registry import ModelCard
from headrace.v1 import types_pb2

_DEFAULTS = SamplingParams()


def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    """What engines always take is set, defaults too; of the rest what is not its default."""
    return types_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        repetition_penalty=_unless_default(params, "repetition_penalty"),
        presence_penalty=_unless_default(params, "presence_penalty"),
        frequency_penalty=_unless_default(params, "frequency_penalty"),
        logit_bias=dict(params.logit_bias),
        min_tokens=params.min_tokens or None,
        stop_token_sequences=_sequences_to_proto(params.stop_token_sequences),
        bad_token_sequences=_sequences_to_proto(params.bad_token_sequences),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def sampling_from_proto(proto: types_pb2.SamplingParams) -> SamplingParams:
    """Absent fields take their defaults. Not validated."""
    has = proto.HasField
    return SamplingParams(
        temperature=_decimal(proto.temperature) if has("temperature") else _DEFAULTS.temperature,
        top_p=_decimal(proto.top_p) if has("top_p") else _DEFAULTS.top_p,
        top_k=proto.top_k if has("top_k") else _DEFAULTS.top_k,
        min_p=_decimal(proto.min_p) if has("min_p") else _DEFAULTS.min_p,
        seed=proto.seed if has("seed") else None,
        max_tokens=proto.max_tokens if has("max_tokens") else None,
        stop_token_ids=tuple(proto.stop_token_ids),
        ignore_eos=proto.ignore_eos,
        repetition_penalty=_decimal(proto.repetition_penalty)
        if has("repetition_penalty")
        else _DEFAULTS.repetition_penalty,
        presence_penalty=_decimal(proto.presence_penalty)
        if has("presence_penalty")
        else _DEFAULTS.presence_penalty,
        frequency_penalty=_decimal(proto.frequency_penalty)
        if has("frequency_penalty")
        else _DEFAULTS.frequency_penalty,
        # Sorted: a map's order is the sender's accident.
        logit_bias=tuple(
            (token, _decimal(proto.logit_bias[token])) for token in sorted(proto.logit_bias)
        ),
        min_tokens=proto.min_tokens,
        stop_token_sequences=tuple(tuple(item.ids) for item in proto.stop_token_sequences),
        bad_token_sequences=tuple(tuple(item.ids) for item in proto.bad_token_sequences),
        logprobs=proto.logprobs if has("logprobs") else None,
        prompt_logprobs=proto.prompt_logprobs if has("prompt_logprobs") else None,
    )


def _unless_default(params: SamplingParams, name: str) -> float | None:
    value: float = getattr(params, name)
    return None if value == getattr(_DEFAULTS, name) else value


def _sequences_to_proto(sequences: tuple[tuple[int, ...], ...]) -> list[types_pb2.TokenSequence]:
    return [types_pb2.TokenSequence(ids=ids) for ids in sequences]


def model_card_to_proto(card: ModelCard) -> types_pb2.ModelCard:
    """What workers of a model agree on."""
    return types_pb2.ModelCard(
        name=card.name,
        revision=card.revision,
        tokenizer_digest=card.tokenizer_digest,
        context_len=card.context_len,
        block_size=card.block_size,
        modalities=card.modalities,
        created=card.created,
    )


def model_card_from_proto(proto: types_pb2.ModelCard) -> ModelCard:
    """The inverse."""
    return ModelCard(
        name=proto.name,
        revision=proto.revision,
        tokenizer_digest=proto.tokenizer_digest,
        context_len=proto.context_len,
        block_size=proto.block_size,
        modalities=tuple(proto.modalities),
        created=proto.created,
    )


def _decimal(value: float) -> float:
    """The decimal that a client meant: 0.7 travels as the float 0.699999988."""
    return float(f"{value:.7g}")
