"""Chat templates: messages → the text that a model was trained to answer.

Templates are the models' own, in jinja2's immutable sandbox, with the functions
and settings of Hugging Face's `apply_chat_template`, so that a rendering here is
the rendering there. A template can fail its request and nothing else: what it
raises becomes InvalidArgument, and its time and output are bounded.

As there, the rendered text is encoded with special tokens parsed, so a message
that holds the text of one ("<|im_end|>") gets that token: who serves untrusted
messages and minds must filter them before.
"""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import HeadraceError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

    from jinja2.parser import Parser

    from services.tokenizer.work import Message

#: Seconds that one rendering may take.
MAX_RENDER_S = 2.0


class ChatTemplate:
    """One model's template, compiled once.

    One that can't be compiled fails each request that needs it: the model still
    serves plain text.
    """

    def __init__(self, model: str, source: str, named_tokens: Mapping[str, str]) -> None:
        self._model = model
        self._named_tokens = dict(named_tokens)
        self._fault = ""
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            self._fault = f"line {error.lineno}: {error.message}"

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        max_len: int,
        max_seconds: float = MAX_RENDER_S,
    ) -> str:
        """The text of `messages`, at most `max_len` characters.

        Main thread only: the time limit is a signal. Raises InvalidArgument with
        the template's own message.
        """
        if self._fault:
            self._refuse(f"is broken, {self._fault}")
        context: dict[str, Any] = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._named_tokens,
        }
        parts, length = [], 0
        try:
            with _time_limit(max_seconds):
                for part in self._template.generate(context):
                    length += len(part)
                    if length > max_len:
                        self._refuse(f"made more than {max_len:,} characters of the messages")
                    parts.append(part)
        except HeadraceError:
            raise
        except _TimeUp:
            self._refuse(f"took more than {max_seconds:g} s")
        # A template is a program of the model's author and may raise anything.
        except Exception as error:  # noqa: BLE001
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            self._refuse(f"refused the messages: {kind}{error}")
        return "".join(parts)

    def _refuse(self, reason: str) -> NoReturn:
        raise InvalidArgument(f"the chat template of {self._model} {reason}", field="messages")


class _TimeUp(BaseException):
    """Not an Exception: no template's handler may swallow it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def on_alarm(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _TimeUp

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks for training what the
    assistant says: here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """See jinja2.ext.Extension."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
