"""Perplexity of real models on a fixed text, against `transformers` with the same weights.

Reference: the GGUF read, dequantized and run in float32 by `transformers`. Ours may
differ by 1 % in what "auto" serves, bfloat16 weights, and by 0.01 % in float32.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from headrace.blocks import unpack_tokens
from headrace.errors import StartupError
from headrace.models.gguf_file import GgufFile
from headrace.models.pull import pull_catalog
from headrace.models.store import resolve
from services.tokenizer.backends import load_backend, read_spec
from tests.torch_subject import BLOCK_SIZE, NUM_BLOCKS, Subject, error, run

from .conftest import fill

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles

TEXT = (Path(__file__).parent.parent / "data" / "mill.txt").read_text()
#: In no order, so that attention gathers.
TABLE = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
DTYPES = {"float32": 1e-4, "auto": 1e-2}


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log-likelihood of each token given those before it."""
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(tokens[1:]))
    return math.exp(loss.item())


def ours(files: ModelFiles, tokens: list[int], dtype: str) -> torch.Tensor:
    """Logits at all positions, by two prefills of unequal length and a decode step."""
    subject = Subject(files, dtype)
    runner = subject.runner()
    assert len(tokens) <= BLOCK_SIZE * len(TABLE)
    bounds = [0, 300, len(tokens) - 1, len(tokens)]
    return torch.cat(
        [subject.logits(runner, run(tokens, start, end, TABLE)) for start, end in pairwise(bounds)]
    )


def test_smollm2(smollm2: ModelFiles, reference: Any) -> None:
    tokens = unpack_tokens(load_backend(read_spec(smollm2)).encode(TEXT))
    with torch.inference_mode():
        expected = perplexity(reference(torch.tensor([tokens])).logits[0], tokens)
    for dtype, tolerance in DTYPES.items():
        found = perplexity(ours(smollm2, tokens, dtype), tokens)
        print(f"smollm2 {dtype}: {found:.4f}, transformers {expected:.4f}")
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "gemma-3-270m"])
def test_larger_models(transformers: Any, name: str) -> None:
    files = pulled(name)
    file = GgufFile(files.path)
    # Twice in a row: longer than Gemma's window of 512 tokens.
    tokens = unpack_tokens(load_backend(read_spec(files)).encode(TEXT * 2))
    if file.metadata["tokenizer.ggml.add_bos_token"]:
        tokens.insert(0, file.metadata["tokenizer.ggml.bos_token_id"])
    config = transformers.AutoConfig.from_pretrained(files.path.parent, gguf_file=files.path.name)
    # A file with an output projection of its own may quantize it otherwise.
    config.tie_word_embeddings = "output.weight" not in file.tensors
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(model, files.path)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    del model
    expected = perplexity(logits, tokens)
    for dtype, tolerance in DTYPES.items():
        mine = ours(files, tokens, dtype)
        found = perplexity(mine, tokens)
        print(f"{name} {dtype}: {found:.4f}, transformers {expected:.4f}, "
              f"logits {error(mine, logits):.1e}")  # fmt: skip
        assert found == pytest.approx(expected, rel=tolerance)
        assert dtype != "float32" or error(mine, logits) < 1e-4


def pulled(name: str) -> ModelFiles:
    """A model of the catalog, fetched now if it is not here."""
    try:
        return resolve(name)
    except StartupError:
        pull_catalog(name, lambda *_: None)
        return resolve(name)
