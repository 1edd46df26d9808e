"""Pulling from a Hugging Face-shaped endpoint: whole, resumed, refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from headrace.errors import StartupError
from headrace.models import store
from headrace.models.hub import Hub, parse_ref
from headrace.models.pull import pull_hub
from tests.integration.hub_parts import COMMIT, FakeHub

REPO = "owner/tiny"
WEIGHTS = random.Random(1).randbytes(1_000_000)
FILES = {
    "README.md": b"# not wanted",
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {"type": "BPE"}}',
    "tokenizer_config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "onnx/model.onnx": b"not wanted",
}
LARGE = frozenset({"model.safetensors"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_MODELS", str(tmp_path / "models"))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "models"


def pull(hub: FakeHub, ref: str = REPO, *, file: str | None = None, attempts: int = 3) -> Path:
    client = Hub(hub.url, attempts=attempts, backoff_s=0.01)
    return pull_hub(client, parse_ref(ref), lambda phase, done, total: None, file=file)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_over(cache: Path) -> list[Path]:
    """Files of unfinished pulls."""
    return [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_whole_model_comes_verified_and_resolves(cache: Path) -> None:
    with FakeHub(REPO, FILES, LARGE) as hub:
        folder = pull(hub, f"{REPO}@v1")
    wanted = ["config.json", "model.json", "model.safetensors"]
    assert names_in(folder) == [*wanted, "tokenizer.json", "tokenizer_config.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    model = store.resolve(REPO)
    assert (model.format, model.path) == ("huggingface", cache / REPO)
    assert store.resolve(f"hf:{REPO}@v1") == model
    manifest = store.read_manifest(model)
    assert manifest is not None
    assert (manifest.source, manifest.revision) == (f"hf:{REPO}@v1", COMMIT)
    assert manifest.licence == "mit"
    assert [m.name for m in store.pulled_models()] == [REPO]
    assert names_in(cache / ".staging") == ["owner--tiny.lock"]


def test_progress_is_of_all_files_together() -> None:
    seen: list[tuple[str, int, int | None]] = []
    with FakeHub(REPO, FILES, LARGE) as hub:
        pull_hub(Hub(hub.url), parse_ref(REPO), lambda *args: seen.append(args))
    total = sum(len(FILES[name]) for name in FILES if name != "README.md") - len(b"not wanted")
    transfers = [(done, all_) for phase, done, all_ in seen if phase.startswith("downloading")]
    assert {all_ for _, all_ in transfers} == {total}
    assert [done for done, _ in transfers] == sorted(done for done, _ in transfers)
    assert transfers[-1][0] == total


@pytest.mark.parametrize("large", [LARGE, frozenset()], ids=["storage", "hub"])
def test_a_cut_connection_is_gone_on_with(large: frozenset[str]) -> None:
    with FakeHub(REPO, FILES, large, cuts={"model.safetensors": [300_000, 200_000]}) as hub:
        folder = pull(hub)
        ranges = [
            s.range for s in hub.gets("model.safetensors") if large == set() or s.host == "storage"
        ]
    assert ranges == ["", "bytes=300000-", "bytes=500000-"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_pull_that_failed_is_gone_on_with_by_the_next(cache: Path) -> None:
    with FakeHub(REPO, FILES, LARGE, cuts={"model.safetensors": [400_000, 0, 0]}) as hub:
        with pytest.raises(StartupError, match=r"failed at byte 400000 of 1000000.*pull again"):
            pull(hub, attempts=2)
        assert not (cache / REPO).exists()
        with pytest.raises(StartupError, match="is not on this machine"):
            store.resolve(f"hf:{REPO}")
        hub.seen.clear()
        hub.cuts.clear()
        folder = pull(hub)
        assert hub.gets("config.json") == []
        assert {s.range for s in hub.gets("model.safetensors")} == {"bytes=400000-"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "model.safetensors.partial" not in names_in(folder)


def test_a_part_of_other_content_is_not_gone_on_with() -> None:
    with FakeHub(REPO, FILES, LARGE, cuts={"model.safetensors": [400_000, 0]}) as hub:
        with pytest.raises(StartupError):
            pull(hub, attempts=1)
        hub.cuts.clear()
        hub.files = {**FILES, "model.safetensors": WEIGHTS[::-1]}
        folder = pull(hub)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_server_errors_are_tried_again() -> None:
    with FakeHub(REPO, FILES, LARGE, failures={"model.safetensors": [503, 500]}) as hub:
        pull(hub, attempts=3)


@pytest.mark.parametrize(
    ("name", "digest"), [("model.safetensors", "sha256"), ("config.json", "sha1")]
)
def test_corrupted_content_is_refused_and_thrown_away(cache: Path, name: str, digest: str) -> None:
    with FakeHub(REPO, FILES, LARGE) as hub:
        hub.corrupted[name] = bytes(len(FILES[name]))
        with pytest.raises(StartupError, match=f"{name} has the {digest} .* thrown away"):
            pull(hub)
        assert not (cache / REPO).exists()
        assert [p for p in left_over(cache) if p.name.startswith(name)] == []
        hub.corrupted.clear()
        assert pull(hub).exists()


def test_content_longer_than_announced_is_refused(cache: Path) -> None:
    with FakeHub(REPO, FILES, LARGE) as hub:
        hub.corrupted["model.safetensors"] = WEIGHTS + b"x"
        with pytest.raises(StartupError, match="more than 1000000 bytes"):
            pull(hub)
    assert not (cache / REPO).exists()


def test_a_pull_replaces_what_is_there() -> None:
    with FakeHub(REPO, FILES, LARGE) as hub:
        pull(hub)
        hub.files = {"config.json": b"{}", "model.safetensors": b"new"}
        folder = pull(hub)
    assert names_in(folder) == ["config.json", "model.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"new"


def test_one_gguf_is_chosen_or_named() -> None:
    files = {"a-q4.gguf": b"GGUF4", "sub/a-q8.gguf": b"GGUF8", "config.json": b"{}"}
    with FakeHub(REPO, files) as hub:
        with pytest.raises(StartupError, match=r"one with --file: a-q4\.gguf, sub/a-q8\.gguf"):
            pull(hub)
        with pytest.raises(StartupError, match=r"no GGUF file 'b\.gguf'"):
            pull(hub, file="b.gguf")
        folder = pull(hub, file="sub/a-q8.gguf")
    assert names_in(folder) == ["a-q8.gguf", "model.json"]
    assert store.resolve(REPO).path == folder / "a-q8.gguf"


def test_the_token_opens_the_hub_and_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub(REPO, FILES, LARGE, token="secret") as hub:
        with pytest.raises(StartupError, match=r"HTTP 401.*set HF_TOKEN"):
            pull(hub)
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(StartupError, match="token in HF_TOKEN does not open it"):
            pull(hub)
        hub.seen.clear()
        monkeypatch.setenv("HF_TOKEN", "secret")
        pull(hub)
        sent = {(s.host, s.authorization) for s in hub.seen}
    assert sent == {("hub", "Bearer secret"), ("storage", "")}


def test_moves_within_the_hub_are_followed() -> None:
    with FakeHub(REPO, FILES, LARGE, moved_from="former/name") as hub:
        client = Hub(hub.url)
        file = client.stat(parse_ref("former/name"), COMMIT, "config.json")
    assert file.size == len(FILES["config.json"])
    assert len(file.etag) == 40


def test_what_is_not_there_is_named() -> None:
    with FakeHub(REPO, FILES) as hub:
        with pytest.raises(StartupError, match="has no owner/other at revision main"):
            pull(hub, "owner/other")
        with pytest.raises(StartupError, match="has no owner/tiny at revision v9"):
            pull(hub, f"{REPO}@v9")
        hub.listing = ["config.json", "model.safetensors", "model-00001-of-00001.safetensors"]
        with pytest.raises(StartupError, match="HTTP 404"):
            pull(hub)
        hub.listing = ["pytorch_model.bin"]
        with pytest.raises(StartupError, match=r"neither config\.json with"):
            pull(hub)


def test_nobody_there_is_said() -> None:
    with FakeHub(REPO, FILES) as hub:
        pass
    with pytest.raises(StartupError, match="can't reach the hub"):
        pull(hub)


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil.json", "a/../../evil", "a\\..\\evil"])
def test_names_that_leave_their_folder_are_refused(cache: Path, name: str) -> None:
    with FakeHub(REPO, FILES) as hub:
        hub.listing = ["config.json", "model.safetensors", name]
        with pytest.raises(StartupError, match="leaves its folder: refused"):
            pull(hub)
    assert left_over(cache) == []


def test_the_endpoint_must_be_given() -> None:
    with pytest.raises(StartupError, match=r"--endpoint .* or HF_ENDPOINT"):
        Hub()
    with pytest.raises(StartupError, match="--endpoint must be"):
        Hub("ftp://hub")


@pytest.mark.parametrize("text", ["tiny", "owner/", "a/b/c", "../x/y", "owner/tiny@", "o/n@../x"])
def test_a_bad_reference_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="hf:OWNER/NAME"):
        parse_ref(text)


def test_one_pull_of_a_model_at_a_time() -> None:
    refused = pytest.raises(StartupError, match="another process is pulling owner/tiny")
    with FakeHub(REPO, FILES) as hub, store.staging(REPO), refused:
        pull(hub)
