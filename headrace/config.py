"""Configuration of a service: one frozen dataclass, read once.

Each field is a flag (`--http-listen`), an environment variable
(`HEADRACE_GATEWAY_HTTP_LISTEN`) and a key of the service's table in a TOML file
(`[gateway] http_listen = …`, file given by `--config`). Flags win over the
environment, the environment over the file, the file over the default. Unknown
keys fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of a config dataclass. Without a default it must be given somewhere."""
    metadata = {"help": help, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def load(
    cls: type[T],
    *,
    service: str,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    description: str = "",
) -> T:
    """Read `cls` from flags, environment and file. Raises StartupError for bad values.

    Types: str, int, float, bool, an optional one of these, and tuple[str, ...]
    (a flag that may be repeated, or a comma-separated value).
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls} is not a dataclass")
    env = os.environ if env is None else env
    hints = get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    flags = vars(_parser(fields, hints, service, description).parse_args(argv))
    table = _table(flags.pop("config") or env.get("HEADRACE_CONFIG"), service)
    unknown = table.keys() - {f.name for f in fields}
    if unknown:
        raise StartupError(f"[{service}] has unknown keys: {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for field in fields:
        variable = _variable(service, field.name)
        if flags[field.name] is not None:
            source, raw = f"--{_flag(field.name)}", flags[field.name]
        elif variable in env:
            source, raw = variable, env[variable]
        elif field.name in table:
            source, raw = f"[{service}] {field.name}", table[field.name]
        elif field.default is dataclasses.MISSING:
            raise StartupError(f"--{_flag(field.name)} (or {variable}) is required")
        else:
            continue
        values[field.name] = _convert(raw, hints[field.name], source)
        choices = field.metadata.get("choices")
        if choices and values[field.name] not in choices:
            allowed = ", ".join(choices)
            raise StartupError(f"{source} must be one of {allowed}, not {values[field.name]!r}")
    return cls(**values)


def split_address(address: str, *, what: str = "address") -> tuple[str, int]:
    """`host:port` (or `[v6]:port`) as its parts. Raises StartupError naming `what`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise StartupError(f"{what} must be HOST:PORT, not {address!r}")
    return host.strip("[]"), int(port)


def _parser(
    fields: Sequence[dataclasses.Field[Any]],
    hints: Mapping[str, Any],
    service: str,
    description: str,
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=description,
        epilog="Every option is also an environment variable "
        f"({_variable(service, fields[0].name)}, …) and a key of [{service}] in the TOML file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file")
    for field in fields:
        text = field.metadata["help"]
        if field.default is not dataclasses.MISSING and field.default not in (None, (), ""):
            text += f" [{field.default}]"
        extra: dict[str, Any] = {"help": text.replace("%", "%%"), "default": None}
        if field.metadata["choices"]:
            extra["choices"] = field.metadata["choices"]
        if _base(hints[field.name]) is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif get_origin(hints[field.name]) is tuple:
            extra.update(action="append", metavar=field.metadata["metavar"])
        else:
            extra["metavar"] = field.metadata["metavar"]
        parser.add_argument(f"--{_flag(field.name)}", dest=field.name, **extra)
    return parser


def _table(path: str | None, service: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise StartupError(f"--config {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise StartupError(f"--config {path}: {error}") from error
    return dict(content.get(service, {}))


def _convert(raw: Any, hint: Any, source: str) -> Any:
    kind = _base(hint)
    if get_origin(hint) is tuple:
        parts = [raw] if isinstance(raw, str) else list(raw)
        return tuple(p.strip() for part in parts for p in part.split(",") if p.strip())
    try:
        if kind is bool and isinstance(raw, str):
            return {"1": True, "true": True, "0": False, "false": False}[raw.lower()]
        return kind(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{source} must be {kind.__name__}, not {raw!r}") from error


def _base(hint: Any) -> type:
    if get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    return typing.cast("type", hint)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _variable(service: str, name: str) -> str:
    return f"HEADRACE_{service}_{name}".upper()
