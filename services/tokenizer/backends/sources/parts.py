"""What the readers of all formats share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.errors import StartupError
from services.tokenizer.backends.token_texts import BYTE_CHARS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def fail(source: str, reason: str) -> NoReturn:
    """Raise StartupError."""
    raise StartupError(f"{source}: {reason}")


def read_json(path: Path, *, optional: bool = False) -> Any:
    """The content of a JSON file; of an optional one that is missing, an empty object."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        if optional:
            return {}
        raise StartupError(f"there is no tokenizer file {path}") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"can't read tokenizer file {path}: {error}") from error


def pair_of(merge: Any, source: str) -> tuple[str, str]:
    """The two sides of a merge, written in one string or two."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2:
        fail(source, f"the merge {merge!r} is not a pair")
    return parts[0], parts[1]


def ids_if(wanted: bool, token_id: int | None) -> tuple[int, ...]:
    """`token_id` if it is wanted and there is one."""
    return (token_id,) if wanted and token_id is not None else ()


def named_tokens(directory: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    """ "eos_token" -> its text, and tokenizer_config.json, which says more."""
    config = read_json(directory / "tokenizer_config.json", optional=True)
    listed = {**read_json(directory / "special_tokens_map.json", optional=True), **config}
    texts = {name: _text(listed.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in texts.items() if text is not None}, config


def eos_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """`eos_id`, and what generation_config.json adds."""
    listed = read_json(directory / "generation_config.json", optional=True).get("eos_token_id")
    ids = [eos_id, *(listed if isinstance(listed, list) else [listed])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's `chat_template` and `tool_template`: the first is chat_template.jinja, or what
    tokenizer_config.json has in its place; the second a variant named `tool_use` there."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return {"chat_template": file.read_text("utf-8")}
    template = config.get("chat_template")
    if not isinstance(template, list):
        return {"chat_template": template}
    by_name = {entry["name"]: entry["template"] for entry in template}
    return {
        "chat_template": by_name.get("default"),
        "tool_template": by_name.get("tool_use"),
    }


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def byte_level(content: bytes) -> str:
    """Bytes in the letters that GPT-2 writes them in (openai/gpt-2, src/encoder.py)."""
    return "".join(map(BYTE_CHARS.__getitem__, content))
