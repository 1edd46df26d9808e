"""What names mean, and what a model is said to be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from headrace.errors import StartupError
from headrace.models import store
from headrace.models.catalog import CATALOG
from headrace.models.describe import describe
from headrace.models.pull import is_present, select

if TYPE_CHECKING:
    from pathlib import Path

    from headrace.models.files import ModelFiles


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def huggingface(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "max_position_embeddings": 128, "vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0" * 24
    )
    return folder


def test_a_missing_catalog_model_says_how_to_pull_it(cache: Path) -> None:
    with pytest.raises(StartupError, match="headrace models pull smollm2-135m"):
        store.resolve("smollm2-135m")


@pytest.mark.parametrize("spec", ["nonsense", "", "hf:", "../models"])
def test_what_is_nowhere_is_refused(cache: Path, spec: str) -> None:
    with pytest.raises(StartupError):
        store.resolve(spec)


def test_names_paths_and_named_paths(cache: Path, tmp_path: Path) -> None:
    folder = huggingface(cache / "owner" / "name")
    other = huggingface(tmp_path / "Other")
    assert store.resolve("owner/name").path == folder
    assert store.resolve("hf:owner/name@main").name == "owner/name"
    assert store.resolve(str(other)).name == "other"
    assert store.resolve(f"mine={other}").name == "mine"
    assert [model.name for model in store.pulled_models()] == ["owner/name"]


def test_the_default_model_is_described(smollm2: ModelFiles) -> None:
    facts = describe(smollm2)
    assert facts.architecture == "llama"
    assert facts.context_len == 8192
    assert facts.tokenizer == "gpt2 (smollm), 49,152 tokens"
    assert facts.quantization.startswith("Q4_1 79 %")
    assert facts.licence == "Apache-2.0"
    assert round(facts.parameters / 1e6) == 135
    assert is_present(CATALOG["smollm2-135m"])


def test_a_huggingface_folder_is_described(tmp_path: Path) -> None:
    facts = describe(store.resolve(str(huggingface(tmp_path / "m"))))
    assert (facts.architecture, facts.context_len, facts.parameters) == ("llama", 128, 12)
    assert (facts.quantization, facts.tokenizer) == ("BF16 100 %", "BPE, 7 tokens")
    assert facts.licence == "not stated"


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, (4).to_bytes(8, "little") + b"nope"])
def test_a_broken_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    folder = huggingface(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(StartupError, match=r"model\.safetensors is no readable"):
        describe(store.resolve(str(folder)))


def test_shards_are_taken_and_other_weights_left() -> None:
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    listed = [*shards, "consolidated.safetensors", index, "config.json", "a.gguf", "tokenizer.json"]
    assert select(listed, "o/n") == ["config.json", index, "tokenizer.json", *shards]
    assert select(["config.json", "adapter.safetensors"], "o/n") == [
        "config.json",
        "adapter.safetensors",
    ]


def test_every_catalog_entry_is_whole() -> None:
    for name, model in CATALOG.items():
        assert model.name == name
        assert model.licence
        for file in model.files:
            assert len(file.sha256) == 64
            assert file.parts
            assert all("==" in part.requirement for part in file.parts)
