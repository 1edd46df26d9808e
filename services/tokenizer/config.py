"""What the tokenizer service is started with."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import option
from services.tokenizer.work import Limits

_LIMITS = Limits()


@dataclass(frozen=True)
class Config:
    """Each field is a flag, a variable HEADRACE_TOKENIZER_… and a key of [tokenizer]."""

    model: tuple[str, ...] = option(
        help="a model whose text to tokenize: a pulled model's name, a path or NAME=PATH; "
        "may be repeated",
        metavar="SPEC",
    )
    listen: str = option("127.0.0.1:50052", help="address to serve on", metavar="HOST:PORT")
    processes: int = option(
        0, help="processes that tokenize; 0: one less than the cores, 2 at least", metavar="N"
    )
    max_text_bytes: int = option(_LIMITS.max_text_bytes, help="longest text of one request")
    max_messages: int = option(_LIMITS.max_messages, help="most messages of one chat")
    max_tokens: int = option(_LIMITS.max_tokens, help="most tokens of one request")
    max_texts: int = option(_LIMITS.max_texts, help="most texts of one batch")
    prefix_cache_bytes: int = option(
        _LIMITS.prefix_cache_bytes, help="what each process keeps of recent prompts"
    )
    max_queued_bytes: int = option(64 << 20, help="bytes of requests that may wait")
    stall_s: float = option(30.0, help="a process that works on one request for longer is killed")
