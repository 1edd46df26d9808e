"""Chat templates: messages → the text that a model was trained to answer.

Templates are the models' own, in a sandbox (see sandbox), with the functions and
settings of Hugging Face's `apply_chat_template`, so that a rendering here is the
rendering there. A template can fail its request and nothing else: what it raises
becomes InvalidArgument with its own message.

As there, the rendered text is encoded with special tokens parsed, so a message
that holds the text of one ("<|im_end|>") gets that token: who serves untrusted
messages and minds must filter them before.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension

from headrace.errors import InvalidArgument
from services.tokenizer.sandbox import LimitExceeded, RenderLimits, Sandbox

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2.parser import Parser

    from services.tokenizer.work import Chat, Message

#: What template arguments can't replace.
_RESERVED = ("messages", "tools", "add_generation_prompt")
#: Under these names messages carry what a model thought; templates read the first,
#: gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_decode_json = msgspec.json.Decoder().decode


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
            self._template = _SANDBOX.from_string(source)
        except TemplateSyntaxError as error:
            self._fault = f"line {error.lineno}: {error.message}"
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            self._fault = f"{type(error).__name__}: {error}"

    def render(self, chat: Chat, limits: RenderLimits) -> str:
        """The text of `chat`.

        Main thread only: the time limit is a signal. Raises InvalidArgument with
        the template's own message, or naming the field that is no JSON.
        """
        if self._fault:
            self._refuse(f"is broken, {self._fault}")
        context = self._context(chat)
        parts, length = [], 0
        try:
            with _SANDBOX.limited(limits):
                for part in self._template.generate(context):
                    length += len(part)
                    if length > limits.max_len:
                        raise LimitExceeded(f"makes more than {limits.max_len:,} characters")
                    parts.append(part)
        except LimitExceeded as error:
            self._refuse(str(error))
        # A template is a program of the model's author and may raise anything.
        except Exception as error:  # noqa: BLE001
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            self._refuse(f"refused the messages: {kind}{error}")
        text = "".join(parts)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self._refuse(f"makes half a character at {error.start:,}: {error.reason}")
        return text

    def _context(self, chat: Chat) -> dict[str, Any]:
        tools = _parsed(chat.tools_json, list, "tools") if chat.tools_json else None
        for at, tool in enumerate(tools or ()):
            _check_object(tool, f"tools[{at}]")
        args: dict[str, Any] = {}
        if chat.template_args_json:
            args = _parsed(chat.template_args_json, dict, "template_args")
        for name in _RESERVED:
            if name in args:
                raise InvalidArgument(
                    f"template_args names {name!r}, which is a field of its own",
                    field="template_args",
                )
        return {
            "documents": None,
            **self._named_tokens,
            **args,
            "messages": [_as_dict(at, message) for at, message in enumerate(chat.messages)],
            "tools": tools,
            "add_generation_prompt": chat.add_generation_prompt,
        }

    def _refuse(self, reason: str) -> NoReturn:
        raise InvalidArgument(f"the chat template of {self._model} {reason}", field="messages")


def _as_dict(at: int, message: Message) -> dict[str, Any]:
    if not message.as_json:
        return {"role": message.role, "content": message.content}
    fields: dict[str, Any] = _parsed(message.as_json, dict, f"messages[{at}]")
    reasoning = next((fields[key] for key in _REASONING if fields.get(key) is not None), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def _parsed(data: bytes, kind: type, field: str) -> Any:
    try:
        value = _decode_json(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{field} is no JSON: {error}", field=field) from None
    if not isinstance(value, kind):
        name = "array" if kind is list else "object"
        raise InvalidArgument(f"{field} is JSON, but no {name}", field=field)
    return value


def _check_object(value: object, field: str) -> None:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} is JSON, but no object", field=field)


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
    """Without jinja's own escapes for HTML."""
    _SANDBOX.check_nodes(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _sandbox() -> Sandbox:
    sandbox = Sandbox([_Generation])
    sandbox.add_filter("tojson", _tojson)
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


_SANDBOX = _sandbox()
