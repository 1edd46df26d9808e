"""What all tests share."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from headrace.models.files import ModelFiles


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The default model, real weights; `make install` fetches it."""
    # Late: tests that need torch alone have no more installed.
    from headrace.models.store import resolve

    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The library, imported late and kept from any network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # First: it sets how OpenMP's threads wait.
    import services.worker.engines.torch  # noqa: F401

    with warnings.catch_warnings():
        # What others deprecate in each other's libraries is not ours to fail on.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        import transformers as library

    return library
