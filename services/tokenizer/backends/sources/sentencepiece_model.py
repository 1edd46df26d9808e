"""SentencePiece's .model files: a ModelProto (sentencepiece, src/sentencepiece_model.proto)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from services.tokenizer.backends.base import AddedToken, TokenizerSpec
from services.tokenizer.backends.charsmap import read_charsmap
from services.tokenizer.backends.normalizers import SentencePiece
from services.tokenizer.backends.sources import parts
from services.tokenizer.backends.sources.parts import fail, ids_if

if TYPE_CHECKING:
    from pathlib import Path

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def read_sentencepiece(path: Path) -> TokenizerSpec:
    """Raises StartupError naming file and fault."""
    # Where no such file is read, the library need not be there.
    from sentencepiece import sentencepiece_model_pb2

    library: Any = sentencepiece_model_pb2

    source = f"tokenizer file {path}"
    model = library.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        fail(source, f"can't be read: {error}")
    trainer, rules = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        fail(source, f"the model type {trainer.model_type} is not supported (unigram, BPE are)")
    if trainer.treat_whitespace_as_suffix:
        fail(source, "treat_whitespace_as_suffix is not supported")
    if not rules.escape_whitespaces:
        fail(source, "escape_whitespaces false is not supported")
    if model.denormalizer_spec.precompiled_charsmap:
        fail(source, "a denormalizer is not supported")
    tokens = [piece.piece for piece in model.pieces]
    if not tokens:
        fail(source, "it has no pieces")
    scores = [piece.score for piece in model.pieces]
    is_bpe = trainer.model_type == _BPE
    named, config = parts.named_tokens(path.parent)
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    found = {name: at for name, at in ids.items() if 0 <= at < len(tokens)}
    return TokenizerSpec(
        source=source,
        family="sentencepiece_bpe" if is_bpe else "unigram",
        tokens=tokens,
        added=_added(model),
        normalizer=SentencePiece(
            read_charsmap(rules.precompiled_charsmap, source),
            [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED],
            adds_prefix=rules.add_dummy_prefix,
            removes_spaces=rules.remove_extra_whitespaces,
        ),
        unk_id=next((at for at, p in enumerate(model.pieces) if p.type == _UNKNOWN), None),
        token_ranks=[-score for score in scores] if is_bpe else None,
        scores=() if is_bpe else scores,
        byte_fallback=trainer.byte_fallback,
        fuse_unk=True,
        prefix_ids=ids_if(config.get("add_bos_token", is_bpe), found.get("bos_token")),
        suffix_ids=ids_if(config.get("add_eos_token", not is_bpe), found.get("eos_token")),
        pad_id=found.get("pad_token"),
        eos_token_ids=parts.eos_ids(path.parent, found.get("eos_token")),
        strips_first_space=rules.add_dummy_prefix,
        **parts.chat_templates(path.parent, config),
        named_tokens={name: tokens[at] for name, at in found.items()} | named,
    )


def _added(model: Any) -> list[AddedToken]:
    return [
        AddedToken(
            at,
            piece.piece,
            piece.type != _USER_DEFINED,
            # A symbol is found in the text as it was made, a control token in ours.
            normalized=piece.type == _USER_DEFINED,
        )
        for at, piece in enumerate(model.pieces)
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
