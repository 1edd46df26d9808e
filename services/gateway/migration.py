"""A sequence that lost its worker goes to another, with what it has generated.

Nothing that was delivered is computed for the client again: the next worker is
given prompt and generated ids apart and goes on behind them. The router is asked
with the blocks of both, and first without the workers where the sequence failed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING

from headrace.errors import (
    HeadraceError,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from headrace.rpc.errors import from_exception
from services.gateway.leg import Leg

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.gateway.fleet import Plan
    from services.gateway.peers import RouteQuery, RouterPeer
    from services.gateway.running import RunningRequest
    from services.gateway.sequence import Sequence

log = logging.getLogger("headrace.gateway")

#: How often to ask for a worker while there is none.
_RETRY_S = 0.25
#: Deaths in a row without a token in between after which a sequence is not tried again:
#: it may be what kills workers, and must not go round the whole fleet. Who only shared
#: a culprit's worker made progress meanwhile.
MAX_KILLS = 2


class Migration:
    """Moves sequences. `query` makes a route query, `submit` sends a sequence."""

    def __init__(
        self,
        router: RouterPeer,
        *,
        query: Callable[[RunningRequest, Sequence], RouteQuery],
        submit: Callable[[RunningRequest, Sequence, Plan], None],
        max_attempts: int,
        wait_s: float,
    ) -> None:
        self._router = router
        self._query = query
        self._submit = submit
        self._max_attempts = max_attempts
        self._wait_s = wait_s

    def move(self, request: RunningRequest, sequence: Sequence, error: HeadraceError) -> None:
        """Start moving `sequence`, or end it, or fail the request with `error`."""
        max_len = request.model.card.context_len - request.encoded.num_tokens
        ended = sequence.natural_end(max_len)
        if ended is not None:
            sequence.finish(ended)
            return
        name = f"{request.request.request_id}/{sequence.index}"
        if sequence.kills >= MAX_KILLS:
            internal = Internal()
            log.error(
                "incident %s: %s was on %d workers in a row when they died, and may be why: %s",
                internal.incident,
                name,
                sequence.kills,
                error.message,
            )
            request.fail(internal)
        elif sequence.attempts >= self._max_attempts:
            log.warning("%s failed on %d workers: %s", name, sequence.attempts, error.message)
            request.fail(Unavailable(error.message, retry_after_ms=1000))
        else:
            request.spawn(self._relocate(request, sequence))

    async def _relocate(self, request: RunningRequest, sequence: Sequence) -> None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._wait_s
        exclude = frozenset(sequence.failed_on)
        try:
            while True:
                query = dataclasses.replace(self._query(request, sequence), exclude=exclude)
                try:
                    plan = await self._router.route(query)
                except (Unavailable, NotFound, ResourceExhausted):
                    if loop.time() + _RETRY_S > give_up_at:
                        raise
                    # There is no other: one that restarted, or is reached again, will do.
                    exclude = frozenset()
                    await asyncio.sleep(_RETRY_S)
                    continue
                sequence.leg = Leg(self._router, plan, 1)
                self._submit(request, sequence, plan)
                return
        except Exception as error:  # noqa: BLE001 - the client must hear of any failure
            request.fail(from_exception(error))
