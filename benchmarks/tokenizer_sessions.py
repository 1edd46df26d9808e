"""What does remembering earlier turns save? CPU of a turn's prompt, with and without.

Real coding-agent conversations (tests/data/agent_sessions.jsonl), rendered by several
models' chat templates. Each turn of each session, in order, is one request: messages in,
ids and block ids out, as a pool process does it. Measured in CPU time of this process
with the prefix cache and without, alternately, each over all sessions; all words are
known to both, as in a process that has run for a while. Ids and block ids must agree.

The table shows µs per turn, and where they go with the cache: `render` (the template),
`encode` and `blocks`; `wire` is what MessagePack takes on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness.report import Spread, last_line, table, versions

from headrace.blocks import TOKEN_LEN, namespace_key
from headrace.models.files import ModelFiles
from headrace.models.store import resolve
from services.tokenizer import work
from services.tokenizer.prefix_cache import packed_block_ids
from services.tokenizer.service import TokenizerService
from services.tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.vocabularies import folder  # noqa: E402 - the tests' data are the benchmark's too

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEY = namespace_key("benchmark")
_OPTIONS = work.EncodeOptions(namespace_key=_KEY, block_size=16)
_MODELS = ("smollm2-135m", "qwen3", "llama3_1", "deepseek_v3")


def turns() -> Iterator[work.Chat]:
    """Every request of every session: all messages up to each of the user's."""
    path = ROOT / "tests" / "data" / "agent_sessions.jsonl"
    for line in path.read_text().splitlines():
        messages = [work.Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
        for end, message in enumerate(messages, 1):
            if message.role == "user":
                yield work.Chat(messages[:end], add_generation_prompt=True)


def files_of(model: str) -> ModelFiles:
    """A model's files: one that lies here, or a vocabulary of the tests."""
    if model == "smollm2-135m":
        return resolve(model)
    return ModelFiles(model, "safetensors", folder(model))


def service_of(model: str, tokenizer: Tokenizer, cache_bytes: int) -> TokenizerService:
    """A process's service, remembering so much."""
    return TokenizerService({model: tokenizer}, work.Limits(prefix_cache_bytes=cache_bytes))


def run(service: TokenizerService, items: list[work.EncodeChat]) -> tuple[float, list[work.Answer]]:
    """CPU seconds, and the answers."""
    started = time.process_time()
    answers = [service.do(item) for item in items]
    return time.process_time() - started, answers


def stages(model: str, tokenizer: Tokenizer, items: list[work.EncodeChat]) -> dict[str, float]:
    """CPU seconds of each stage, with the cache."""
    service = service_of(model, tokenizer, work.Limits().prefix_cache_bytes)
    spent = dict.fromkeys(("render", "encode", "blocks", "wire"), 0.0)
    clock = time.process_time
    for item in items:
        marks = [clock()]
        body = work.frame(item, 1)[work.HEADER.size :]
        work.decode_work(body)
        marks.append(clock())
        text = service._render(model, item.chat)
        marks.append(clock())
        ids = service._encoders[model].encode(text)
        marks.append(clock())
        blocks = packed_block_ids(ids, 16, _KEY, service._cache)
        marks.append(clock())
        work.decode_answer(work.frame(work.Encoded(ids, blocks, ""), 1)[work.HEADER.size :])
        marks.append(clock())
        for name, at in (("wire", 0), ("render", 1), ("encode", 2), ("blocks", 3), ("wire", 4)):
            spent[name] += marks[at + 1] - marks[at]
    return spent


def measure(model: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """µs per turn with and without, by stage, and tokens per turn."""
    tokenizer = Tokenizer(files_of(model))
    items = [work.EncodeChat(model, chat, _OPTIONS) for chat in turns()]
    cache_bytes = work.Limits().prefix_cache_bytes
    run(service_of(model, tokenizer, 0), items)
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(rounds):
        plain_s, expected = run(service_of(model, tokenizer, 0), items)
        cached_s, answers = run(service_of(model, tokenizer, cache_bytes), items)
        assert answers == expected, f"{model}: a remembered turn differs"
        found["without"].append(plain_s / len(items) * 1e6)
        found["with"].append(cached_s / len(items) * 1e6)
    by_stage = {k: s / len(items) * 1e6 for k, s in stages(model, tokenizer, items).items()}
    ids = sum(len(a.token_ids) for a in expected if isinstance(a, work.Encoded))
    return found, by_stage, ids // TOKEN_LEN // len(items)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of each")
    parser.add_argument("--model", action="append", choices=_MODELS)
    args = parser.parse_args()
    rows, ratios, figures = [], {}, {}
    for model in args.model or _MODELS:
        found, by_stage, num_tokens = measure(model, 1 if args.quick else 5)
        plain, cached = Spread.of(found["without"]), Spread.of(found["with"])
        ratio = plain.median / cached.median
        ratios[f"session_turn_speed_with_prefix_cache_{model}"] = round(ratio, 2)
        for name, spread in (("without", plain), ("with", cached)):
            values = (spread.median, spread.low, spread.high)
            figures[f"{model}_us_{name}"] = [round(value, 1) for value in values]
        figures[f"{model}_us_stages"] = {name: round(us, 1) for name, us in by_stage.items()}
        cells = [f"{us:.0f}" for us in by_stage.values()]
        rows.append([model, num_tokens, plain, cached, f"{ratio:.1f}", *cells])
    header = ["model", "tokens", "µs without", "µs with", "times", "render", "encode", "blocks"]
    print(table([*header, "wire"], rows))
    found_versions = versions("jinja2", "msgspec", "regex")
    print(last_line("tokenizer_sessions", ratios=ratios, figures=figures, versions=found_versions))


if __name__ == "__main__":
    main()
