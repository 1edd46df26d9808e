"""Trace readers: what they read, and that what they can't read is named by place and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StartupError
from services.replay import traces
from services.replay.traces import TraceOptions, base, load, sessions
from services.replay.workload import Trace

DATA = Path(__file__).resolve().parents[2] / "data"
WHOLE = DATA.parents[1] / "benchmarks" / "data"
GOOD = {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]}
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ROW = "2023-11-16 18:15:46.6805900,374,44\n"
DIALOGUE = [
    {"role": "system", "content": "s" * 400},
    {"role": "user", "content": "u" * 200},
    {"role": "assistant", "content": "a" * 81},
    {"role": "user", "content": "v" * 100},
    {"role": "assistant", "content": "b"},
]


def _file(folder: Path, *lines: Any, name: str = "trace") -> str:
    path = folder / name
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return str(path)


def _load(source: str, **options: Any) -> Trace:
    return load(source, TraceOptions(**options))


def _refused(source: str, **options: Any) -> str:
    with pytest.raises(StartupError) as caught:
        _load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Mooncake


def test_mooncake_slice_is_read_whole() -> None:
    trace = _load(str(DATA / "mooncake_500.jsonl"))
    first, last = trace.requests[0], trace.requests[-1]
    assert (len(trace.requests), trace.block_size) == (500, 512)
    assert (first.arrival_ms, first.num_tokens, first.output_tokens) == (0.0, 6758, 500)
    assert first.hash_ids == tuple(range(14))
    assert (last.arrival_ms, last.num_tokens, last.output_tokens) == (165_000.0, 15597, 138)


def test_the_slice_begins_the_whole_trace() -> None:
    whole = (WHOLE / "mooncake_conversation_trace.jsonl").read_bytes()
    assert whole.startswith((DATA / "mooncake_500.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"timestamp": -1}, "timestamp must be from 0"),
        ({"timestamp": "0"}, "timestamp must be a number, not '0'"),
        ({"timestamp": float("nan")}, "timestamp must be from 0"),
        ({"input_length": 0}, "input_length must be from 1 to 10,000,000, not 0"),
        ({"input_length": 10**9}, "not 1000000000"),
        ({"input_length": True}, "input_length must be a number, not True"),
        ({"output_length": 1.5}, "output_length must be an integer, not 1.5"),
        ({"output_length": None}, "output_length must be a number, not None"),
        ({"hash_ids": 5}, "hash_ids must be a list of integers, not 5"),
        ({"hash_ids": [1, "x"]}, "hash_ids[1] must be an integer from 0 to 2^63 - 1, not 'x'"),
        ({"hash_ids": [-4]}, "hash_ids[0] must be an integer from 0 to 2^63 - 1, not -4"),
        ({"hash_ids": [1, 2, 3]}, "hash_ids has 3 ids, and an input_length of 1000 is 2 pieces"),
        ({"session_id": [1]}, "session_id must be a string or an integer, not [1]"),
        ({"priority": 1000}, "priority must be from -100 to 100, not 1000"),
    ],
)
def test_mooncake_bad_values(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    source = _file(tmp_path, GOOD, "\n", GOOD | changed)
    message = _refused(source)
    assert message.startswith(f"{source}:3: ")
    assert named in message


def test_mooncake_missing_field(tmp_path: Path) -> None:
    source = _file(tmp_path, {"timestamp": 0, "input_length": 10})
    assert _refused(source) == f"{source}:1: output_length is missing"


@pytest.mark.parametrize("line", ["{", "[1]\n", '"x"\n', "[" * 100_000, '{"a": 1' + "0" * 5000])
def test_lines_that_are_no_json_object(line: str, tmp_path: Path) -> None:
    source = _file(tmp_path, GOOD, line)
    assert _refused(source).startswith(f"{source}:2: ")


def test_ids_may_stand_for_other_pieces(tmp_path: Path) -> None:
    source = _file(tmp_path, GOOD | {"hash_ids": list(range(16))})
    assert "--trace-block-size" in _refused(source)
    assert _load(source, trace_block_size=64).block_size == 64


def test_arrivals_are_put_in_order_and_limited(tmp_path: Path) -> None:
    late, early = GOOD | {"timestamp": 50.5}, GOOD | {"timestamp": 2}
    source = _file(tmp_path, GOOD, late, early)
    assert [r.arrival_ms for r in _load(source).requests] == [0, 2, 50.5]
    assert [r.arrival_ms for r in _load(source, limit=2).requests] == [0, 50.5]


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 10**9),
            st.integers(1, 5000),
            st.integers(1, 5000),
            st.lists(st.integers(0, 2**63 - 1), max_size=10),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_mooncake_round_trip(rows: list[tuple[int, int, int, list[int]]]) -> None:
    written = [(at, n, out, ids[: -(-n // 512)]) for at, n, out, ids in sorted(rows)]
    lines = [
        (base.Place("x", number), dict(zip(GOOD, row, strict=True)))
        for number, row in enumerate(written, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.replay.traces.mooncake.records", lambda _: iter(lines))
        read = _load("x", format="mooncake").requests
    assert [(r.arrival_ms, r.num_tokens, r.output_tokens, list(r.hash_ids)) for r in read] == [
        (float(at), n, out, ids) for at, n, out, ids in written
    ]


# Azure


def test_azure_trace() -> None:
    trace = _load(str(WHOLE / "azure_llm_2023_conv.csv"), limit=1000)
    first, second = trace.requests[:2]
    assert (len(trace.requests), trace.block_size) == (1000, 0)
    assert (first.arrival_ms, first.num_tokens, first.output_tokens) == (0.0, 374, 44)
    # 18:15:46.680590 to 18:15:50.995169
    assert second.arrival_ms == pytest.approx(4314.579)
    assert first.hash_ids == ()


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("yesterday,1,2\n", "TIMESTAMP must be like 2023-11-16 18:15:46.6805900, not 'yesterday'"),
        ("2023-11-15 00:00:00,1,2\n", "TIMESTAMP must not be before the first row's"),
        ("2023-11-17 00:00:00+01:00,1,2\n", "TIMESTAMP must have a time zone in all rows"),
        ("2023-11-17 00:00:00,0,2\n", "ContextTokens must be an integer from 1"),
        ("2023-11-17 00:00:00,5,-2\n", "GeneratedTokens must be an integer from 1"),
        ("2023-11-17 00:00:00,5,2.5\n", "not '2.5'"),
        ("2023-11-17 00:00:00,5,٣\n", "not '٣'"),
        (f"2023-11-17 00:00:00,5,{'9' * 5000}\n", "GeneratedTokens must be an integer from 1"),
        ("2023-11-17 00:00:00,5\n", "3 columns are expected, not 2"),
    ],
)
def test_azure_bad_rows(row: str, named: str, tmp_path: Path) -> None:
    source = _file(tmp_path, HEADER, ROW, row)
    message = _refused(source)
    assert message.startswith(f"{source}:3: ")
    assert named in message


def test_azure_without_a_header(tmp_path: Path) -> None:
    source = _file(tmp_path, ROW)
    assert _refused(source, format="azure").startswith(f"{source}:1: the header must name")


def test_azure_with_a_header_alone(tmp_path: Path) -> None:
    source = _file(tmp_path, HEADER)
    assert _refused(source) == f"{source}: the trace has no requests"


# Conversations


def test_turns_grow_and_share(tmp_path: Path) -> None:
    source = _file(tmp_path, {"messages": DIALOGUE}, {"messages": DIALOGUE[:3]})
    trace = _load(source)
    first, other, second = trace.requests
    # Each message has 4 tokens besides its text; 4 characters are a token.
    assert (first.num_tokens, first.output_tokens) == ((400 + 200) // 4 + 2 * 4, 21)
    assert second.num_tokens == -(-(400 + 200 + 81 + 100 + 4 * 16) // 4)
    assert second.output_tokens == 1
    assert second.hash_ids[: len(first.hash_ids)] == first.hash_ids == other.hash_ids
    assert len(second.hash_ids) == second.num_tokens // sessions.BLOCK_SIZE
    assert first.session_id == second.session_id != other.session_id
    gap = first.output_tokens * sessions.MS_PER_TOKEN + sessions.PAUSE_MS
    assert [first.arrival_ms, other.arrival_ms, second.arrival_ms] == [0, 2000, gap]


def test_ids_depend_on_all_before_them(tmp_path: Path) -> None:
    changed = [DIALOGUE[0] | {"content": "z" + "s" * 399}, *DIALOGUE[1:3]]
    source = _file(tmp_path, {"messages": DIALOGUE[:3]}, {"messages": changed})
    one, two = _load(source).requests
    assert not set(one.hash_ids) & set(two.hash_ids)


def test_real_conversations_share_their_prefixes() -> None:
    trace = _load(str(DATA / "agent_sessions.jsonl"))
    seen: set[int] = set()
    reused = total = 0
    for request in trace.requests:
        reused += sum(hash_id in seen for hash_id in request.hash_ids)
        total += len(request.hash_ids)
        seen.update(request.hash_ids)
    assert len({request.session_id for request in trace.requests}) == 7
    assert len(trace.requests) > 50
    assert 0.8 < reused / total < 1
    assert _load(str(DATA / "agent_sessions.jsonl"), limit=9).requests == trace.requests[:9]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"messages": "hello"}, "messages must be a list, not 'hello'"),
        ({"messages": ["hello"]}, "messages[0] must be an object, not 'hello'"),
        ({"messages": [{"role": 1, "content": ""}]}, "messages[0].role must be a string, not 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be a string, not None"),
        ({"messages": DIALOGUE, "timestamp": -1}, "timestamp must be from 0"),
    ],
)
def test_conversations_bad_values(line: Any, named: str, tmp_path: Path) -> None:
    source = _file(tmp_path, {"messages": DIALOGUE}, line)
    message = _refused(source)
    assert message.startswith(f"{source}:2: ")
    assert named in message


def test_conversations_without_answers(tmp_path: Path) -> None:
    source = _file(tmp_path, {"messages": DIALOGUE[:2]})
    assert _refused(source) == f"{source}: the trace has no requests"


# Any format


def test_unknown_beginning(tmp_path: Path) -> None:
    source = _file(tmp_path, "hello\n")
    message = _refused(source)
    assert message.startswith(f"{source}:1: ")
    assert all(name in message for name in traces.FORMATS)


def test_unknown_format(tmp_path: Path) -> None:
    assert "not 'yaml'" in _refused(_file(tmp_path, GOOD), format="yaml")


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    assert "can't be read: No such file" in _refused(str(tmp_path / "absent"))
    assert "can't be read: Is a directory" in _refused(str(tmp_path))
    assert "an empty file is no trace" in _refused(_file(tmp_path, "\n\n"))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    assert _refused(str(path)) == f"{path}:2: not UTF-8: byte 0xff at 0"


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(_load(str(path)).requests) == 1


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _file(tmp_path, GOOD, GOOD, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(base, "MAX_LINE_LEN", 40)
        assert "a line may have 40 bytes" in _refused(source)
    with monkeypatch.context() as patch:
        patch.setattr(base, "MAX_REQUESTS", 2)
        assert _refused(source).startswith(f"{source}:3: a trace may have 2 requests")
        assert len(_load(source, limit=2).requests) == 2
    with monkeypatch.context() as patch:
        patch.setattr(base, "MAX_HASH_IDS", 3)
        assert _refused(source).startswith(f"{source}:2: a trace may have 3 hash ids")


@given(data=st.binary(max_size=200))
def test_nothing_but_startup_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for name in ("", "mooncake", "azure", "sessions"):
        path.write_bytes(data)
        message = ""
        try:
            assert _load(str(path), format=name).requests
        except StartupError as error:
            message = str(error)
        assert not message or str(path) in message
