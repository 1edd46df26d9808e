"""Vocabularies made up for tests of what lies above the families."""

from __future__ import annotations

from typing import Literal, cast

from services.tokenizer.backends.base import AddedToken, TokenizerSpec


def toy_spec(added: list[AddedToken], prepend: str) -> TokenizerSpec:
    """Lower-cases what is no added token, so that normalizing shows."""
    return TokenizerSpec(
        source="a toy",
        family="byte_level_bpe",
        tokens=(),
        added=added,
        normalizer=str.lower,
        prepend_space=cast("Literal['never', 'first', 'always']", prepend),
    )
