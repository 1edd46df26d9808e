"""What all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from headrace.models.store import resolve

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The default model, real weights; `make install` fetches it."""
    return resolve("smollm2-135m")
