"""Configuration: precedence, conversion, and clear refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.config import load, option, split_address
from headrace.errors import StartupError


@dataclass(frozen=True, kw_only=True)
class Example:
    listen: str = option("127.0.0.1:1", help="where to listen")
    router: str = option(help="the router's address")
    workers: int = option(2, help="how many")
    grace_s: float = option(1.5, help="seconds")
    verbose: bool = option(False, help="say more")
    models: tuple[str, ...] = option((), help="models")
    name: str | None = option(None, help="a name")
    policy: str = option("kv", help="policy", choices=["kv", "round_robin"])


def read(*argv: str, env: dict[str, str] | None = None) -> Example:
    return load(Example, service="example", argv=argv, env=env or {})


def test_defaults_and_required() -> None:
    assert read("--router", "r:1") == Example(router="r:1")
    with pytest.raises(StartupError, match=r"--router \(or HEADRACE_EXAMPLE_ROUTER\)"):
        read()


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[example]\nrouter = "file:1"\nworkers = 3\ngrace_s = 4\nverbose = true\n')
    env = {"HEADRACE_EXAMPLE_WORKERS": "4", "HEADRACE_EXAMPLE_NAME": "env"}
    got = read("--config", str(file), "--name", "flag", env=env)
    assert got == Example(router="file:1", workers=4, grace_s=4.0, verbose=True, name="flag")


def test_lists_repeat_or_split() -> None:
    assert read("--router", "r", "--models", "a,b", "--models", "c").models == ("a", "b", "c")
    env = {"HEADRACE_EXAMPLE_MODELS": "a, b", "HEADRACE_EXAMPLE_VERBOSE": "true"}
    got = read("--router", "r", env=env)
    assert got.models == ("a", "b")
    assert got.verbose


@pytest.mark.parametrize(
    ("argv", "env", "text"),
    [
        (["--router", "r", "--workers", "two"], {}, "--workers must be int, not 'two'"),
        (["--router", "r"], {"HEADRACE_EXAMPLE_VERBOSE": "maybe"}, "VERBOSE must be bool"),
        (["--router", "r"], {"HEADRACE_EXAMPLE_POLICY": "best"}, "one of kv, round_robin"),
        (["--router", "r", "--config", "/nowhere.toml"], {}, "/nowhere.toml"),
    ],
)
def test_bad_values_name_their_source(argv: list[str], env: dict[str, str], text: str) -> None:
    with pytest.raises(StartupError, match=text):
        read(*argv, env=env)


def test_unknown_keys_fail(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[example]\nrouter = "r"\nwokers = 3\n')
    with pytest.raises(StartupError, match="unknown keys: wokers"):
        read("--config", str(file))


def test_addresses() -> None:
    assert split_address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    for bad in ("80", "host", "host:", "host:x", "host:99999"):
        with pytest.raises(StartupError, match="HOST:PORT"):
            split_address(bad)
