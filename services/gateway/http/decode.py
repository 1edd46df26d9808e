"""From bytes to a typed body: what is wrong with the JSON or its types, in a client's words.

Pure. It knows types and paths, not what values mean.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from headrace.errors import InvalidArgument

#: Of what a client sent, no more than this is repeated to it.
_MAX_QUOTED_LEN = 64

Body = TypeVar("Body")


def decode(decoder: msgspec.json.Decoder[Body], data: bytes, within: str = "") -> Body:
    """`data` as the decoder's type. Raises InvalidArgument naming the field or the byte.

    `within` is the path of what `data` is, if it is not a whole body."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), within) from error
    except msgspec.DecodeError as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        where = f"after its {len(data)} bytes" if "truncated" in reason else ""
        raise InvalidArgument(f"the body is not valid JSON: {reason} {where}".rstrip()) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not UTF-8: {error.reason}{_byte_of(data)}") from error
    except RecursionError as error:
        raise InvalidArgument("the body is nested too deeply") from error


def _byte_of(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f" (byte {error.start})"
    return ""


_AT = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_WRONG_TYPE = re.compile(r"Expected `(.*)`, got `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)

#: The decoder's names of types, as JSON and people call them.
_TYPE_NAMES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def _refusal(text: str, within: str) -> InvalidArgument:
    """What the decoder says about types, said to a client."""
    at = _AT.search(text)
    path = _join(within, at.group(1) if at else "")
    reason = text[: at.start()] if at else text
    if found := _UNKNOWN.fullmatch(reason):
        field = cut(_join(path, found.group(1)))
        return InvalidArgument(f"unknown parameter '{field}'", field=field)
    if found := _MISSING.fullmatch(reason):
        field = _join(path, found.group(1))
        return InvalidArgument(f"{field} is required", field=field)
    if found := _WRONG_TYPE.fullmatch(reason):
        expected = " or ".join(_type_name(kind) for kind in found.group(1).split(" | "))
        reason = f"must be {expected}, not {_type_name(found.group(2))}"
        return InvalidArgument(f"{path or 'the body'} {reason}", field=path)
    return InvalidArgument(f"{path or 'the body'}: {reason.lower()}", field=path)


def _type_name(kind: str) -> str:
    return _TYPE_NAMES.get(kind, kind)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def cut(text: str) -> str:
    """`text` as far as it may be repeated to the client that sent it."""
    return text if len(text) <= _MAX_QUOTED_LEN else text[:_MAX_QUOTED_LEN] + "…"
