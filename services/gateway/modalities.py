"""The kinds of work that a gateway serves: a table from modality to its HTTP routes.

A model's card names its modalities, and a request for one that it lacks is refused
by name. Adding a modality is a function that returns its routes, and one line
here; its gRPC side is an RPC of `InferenceService`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from headrace.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiohttp.web import RouteDef

    from headrace.registry import ModelCard
    from services.gateway.http.handlers import Handlers

#: modality -> function(Handlers) -> its routes.
MODALITIES = {
    "text": "services.gateway.http.handlers:text_routes",
    "embedding": "services.gateway.http.handlers:embedding_routes",
}


def routes(modality: str, handlers: Handlers) -> Iterable[RouteDef]:
    """The HTTP routes of an entry of `MODALITIES`."""
    module, _, attribute = MODALITIES[modality].partition(":")
    build: Callable[[Handlers], Iterable[RouteDef]] = getattr(import_module(module), attribute)
    return build(handlers)


def check_modality(card: ModelCard, wanted: str) -> None:
    """Raises InvalidArgument if the model does not do what is wanted of it."""
    if wanted not in card.modalities:
        does = ", ".join(card.modalities) or "nothing that is known here"
        raise InvalidArgument(f"model {card.name!r} does {does}, not {wanted}", field="model")
