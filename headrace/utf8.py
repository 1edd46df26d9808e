"""How wrong bytes are shown, beyond Python's own error handlers.

The tokenizer service and the gateway decode with the same one, or streamed text
would not be the text that decoding at once gives.
"""

from __future__ import annotations

import codecs

#: An error handler for `bytes.decode` and incremental decoders: each byte that is part of
#: no whole character becomes one U+FFFD, as SentencePiece's byte fallback has it.
#: Python's "replace" makes one of a whole truncated character.
REPLACE_EACH_BYTE = "headrace.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(REPLACE_EACH_BYTE, _replace_each_byte)
