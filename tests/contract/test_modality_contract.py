"""What every modality of the table brings, and that no engine claims one that is not there."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.errors import InvalidArgument
from headrace.models.files import ModelFiles
from headrace.registry import ModelCard
from services.gateway.http.handlers import Handlers
from services.gateway.modalities import MODALITIES, check_modality, routes
from services.worker.engine import EngineConfig
from services.worker.engines import create


@pytest.mark.parametrize("modality", MODALITIES)
def test_it_has_routes_of_its_own(modality: str) -> None:
    pipeline: Any = None
    handlers = Handlers(pipeline, max_body_len=1, max_client_buffer_len=1)
    paths = {name: {r.path for r in routes(name, handlers)} for name in MODALITIES}
    assert paths[modality]
    assert all(path.startswith("/v1/") for path in paths[modality])
    others = set().union(*(found for name, found in paths.items() if name != modality))
    assert not paths[modality] & others


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_model_without_it_refuses_it_by_name(modality: str) -> None:
    card = ModelCard("m", "revision", "digest", 64, 16, (modality,), 0)
    check_modality(card, modality)
    with pytest.raises(InvalidArgument, match=r"'m' does .*, not telepathy") as caught:
        check_modality(card, "telepathy")
    assert caught.value.field == "model"


def test_engines_name_modalities_of_the_table(smollm2: ModelFiles) -> None:
    engine = create(
        "sim", EngineConfig(str(smollm2.path), smollm2.name), lambda phase, fraction: None
    )
    try:
        assert set(engine.info.modalities) <= set(MODALITIES)
    finally:
        engine.close()
