r"""A long text's words, some at a time, so that they are not all in memory at once.

A text may be cut where every pre-tokenizer here cuts anyway, whatever stands
before and behind:

    word| word     between what is no white space, and a space with no other behind it
    word|, word    between a letter, and a sign or a line's end

The second does not hold for those that cut at spaces alone, nor either for a
pattern that nobody has looked at: each names the boundaries that it has. No
pattern looks behind itself, so what follows a boundary is as good as a new text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Characters of an ASCII text that are cut at a time.
WINDOW_LEN = 1 << 16
#: Of any other: short, since where a window happens to be ASCII a faster pattern does.
MIXED_WINDOW_LEN = 1 << 11

#: Boundaries of those that cut at spaces alone. Python's \s takes some controls
#: beside white space: no harm here.
SPACES = re.compile(r"\S(?= \S)").search
#: Boundaries of all that tell letters from signs. Letters of a few scripts will do.
LETTERS = re.compile(
    r"\S(?= \S)|[A-Za-z\u0430-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
    r"(?=[\n,.;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
).search
#: Boundaries of those that may let signs and spaces stand together.
PLAIN_LETTERS = re.compile(
    r"[A-Za-z](?= [A-Za-z]|[\n,.])|[\u4e00-\u9fa5](?=[\n\u3002\uff0c])"
).search


def windows(
    text: str,
    boundary: Callable[[str, int], re.Match[str] | None] | None,
    window_len: int | None = None,
) -> Iterator[str]:
    """`text` in parts whose words are those of the whole; in one without a `boundary`."""
    length = window_len or (WINDOW_LEN if text.isascii() else MIXED_WINDOW_LEN)
    if boundary is None or len(text) <= length:
        yield text
        return
    start = 0
    while (found := boundary(text, start + length - 1)) is not None:
        yield text[start : found.end()]
        start = found.end()
        if start + length > len(text):
            break
    yield text[start:]
