"""Which models can be served: those with a worker, and a tokenizer that agrees with it.

A model whose workers and tokenizer service have different tokenizer digests is
refused loudly, and stays unavailable until they agree: its text would be wrong
without anyone noticing. It chooses no worker.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.blocks import namespace_key
from headrace.errors import HeadraceError, NotFound, Unavailable
from headrace.registry import ModelCard
from services.gateway.detokenizer import DetokenizerTable
from services.gateway.generation import ServedModel
from services.gateway.parsers import AnswerFormat, check_told, detect

if TYPE_CHECKING:
    from services.gateway.fleet import FleetModel
    from services.gateway.peers import TokenizerPeer

log = logging.getLogger("headrace.gateway")

#: How often to ask the tokenizer service again about models that it does not know.
_RETRY_S = 0.5
_MAX_TABLES = 16


@dataclass(frozen=True, slots=True)
class Model:
    """All that serving one model takes."""

    card: ModelCard
    namespace_key: bytes
    table: DetokenizerTable
    format: AnswerFormat = field(default_factory=AnswerFormat)


class ModelTable:
    """The models of the last fleet, and their detokenizer tables. Run `maintain` beside it."""

    def __init__(self, tokenizer: TokenizerPeer, tool_parsers: tuple[str, ...] = ()) -> None:
        """`tool_parsers`: see `parsers.detect`. Raises StartupError for one that is not there."""
        check_told(tool_parsers)
        self._tokenizer = tokenizer
        self._tool_parsers = tool_parsers
        #: Chat templates by digest, beside the tables.
        self._templates: dict[str, str] = {}
        self._fleet: dict[str, FleetModel] | None = None
        self._ever_served: set[str] = set()
        self._models: dict[str, Model] = {}
        self._tables: dict[str, DetokenizerTable] = {}
        self._refused: dict[str, str] = {}
        self._changed = asyncio.Event()

    def update(self, fleet: tuple[FleetModel, ...]) -> None:
        """A new fleet came."""
        self._fleet = {entry.card.name: entry for entry in fleet}
        self._ever_served |= self._fleet.keys()
        self._rebuild()

    def find(self, name: str) -> Model:
        """The model, ready to be served. Raises NotFound, or Unavailable saying what lacks."""
        if self._fleet is None:
            raise Unavailable("the gateway has not heard of any worker yet", retry_after_ms=500)
        if name not in self._ever_served:
            names = ", ".join(sorted(self._fleet)) or "none"
            raise NotFound(f"model {name!r} is not served here; served: {names}", field="model")
        if name not in self._fleet or not self._fleet[name].workers:
            raise Unavailable(f"no worker serves {name} at the moment", retry_after_ms=1000)
        if name in self._refused:
            raise Unavailable(self._refused[name], retry_after_ms=5000)
        if name not in self._models:
            raise Unavailable(f"no tokenizer for {name} is known yet", retry_after_ms=500)
        return self._models[name]

    def served(self) -> list[ServedModel]:
        """The models that `find` finds, by name."""
        return [
            ServedModel(
                name=name,
                created=model.card.created,
                context_len=model.card.context_len,
                num_workers=len(self._workers(name)),
                revision=model.card.revision,
                tokenizer_digest=model.card.tokenizer_digest,
                block_size=model.card.block_size,
                modalities=model.card.modalities,
            )
            for name, model in sorted(self._models.items())
            if self._workers(name)
        ]

    @property
    def any_served(self) -> bool:
        return any(self._workers(name) for name in self._models)

    def distrust(self, model: Model, actual_digest: str) -> Unavailable:
        """The tokenizer service answered with another digest: ask it anew. Returns the error."""
        self._tables.pop(model.card.tokenizer_digest, None)
        error = self._refuse(model.card, actual_digest)
        self._rebuild()
        return error

    async def maintain(self) -> None:
        """Fetch tables as fleets need them. Runs until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while missing := self._missing():
                await self._fetch(missing)
                if self._missing():
                    await asyncio.sleep(_RETRY_S)

    def _workers(self, name: str) -> tuple[object, ...]:
        entry = (self._fleet or {}).get(name)
        return entry.workers if entry else ()

    def _missing(self) -> list[ModelCard]:
        cards = [entry.card for entry in (self._fleet or {}).values()]
        return [card for card in cards if card.tokenizer_digest not in self._tables]

    async def _fetch(self, missing: list[ModelCard]) -> None:
        try:
            loaded = await self._tokenizer.loaded()
            for card in missing:
                actual = loaded.get(card.name)
                if actual is None:
                    continue
                if actual.digest != card.tokenizer_digest:
                    self._refuse(card, actual.digest)
                    continue
                self._templates[card.tokenizer_digest] = actual.chat_template
                table = await self._tokenizer.table(card.name)
                if table.tokenizer_digest == card.tokenizer_digest:
                    self._tables[card.tokenizer_digest] = table
        except Unavailable:
            pass  # the peer's own log says so; asked again soon
        except (HeadraceError, ValueError) as error:
            log.error("could not get the detokenizer tables: %s", error)
        self._rebuild()

    def _refuse(self, card: ModelCard, actual: str) -> Unavailable:
        reason = (
            f"model {card.name} is refused: its workers were loaded with tokenizer "
            f"{card.tokenizer_digest[:12]}, the tokenizer service with {actual[:12]}; "
            "start both from the same files"
        )
        if self._refused.get(card.name) != reason:
            self._refused[card.name] = reason
            log.error("%s", reason)
        return Unavailable(reason, retry_after_ms=5000)

    def _rebuild(self) -> None:
        self._models = {
            name: Model(
                entry.card,
                namespace_key(entry.card.revision),
                table,
                detect(name, self._templates[entry.card.tokenizer_digest], self._tool_parsers),
            )
            for name, entry in (self._fleet or {}).items()
            if (table := self._tables.get(entry.card.tokenizer_digest)) is not None
        }
        for name in self._models:
            self._refused.pop(name, None)
        in_use = {model.card.tokenizer_digest for model in self._models.values()}
        for digest in [d for d in self._tables if d not in in_use][: -_MAX_TABLES or None]:
            del self._tables[digest]
            self._templates.pop(digest, None)
        self._changed.set()
