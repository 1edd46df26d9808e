"""The way of a request: tokenizer, router, worker, and back to its sink.

    start: check ─ find model ─ tokenize ─ route ─ submit n sequences
    then:  worker's frames ─> Sequence ─> sink          (no task, no queue, no await)
    lost:  Migration ─ route ─ submit, as often as allowed

It speaks no wire: peers and worker streams do, below it; edges do, above it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from typing import TYPE_CHECKING

from headrace import telemetry
from headrace.errors import HeadraceError, InvalidArgument, ResourceExhausted, Unavailable
from headrace.service import cancel_and_wait
from services.gateway import prompt_text
from services.gateway.leg import Leg
from services.gateway.migration import Migration
from services.gateway.modalities import check_modality
from services.gateway.models import ModelTable
from services.gateway.peers import RouteQuery, RouterPeer, TokenizerPeer
from services.gateway.running import RunningRequest
from services.gateway.sequence import Sequence, seed_of
from services.gateway.submission import Submission
from services.gateway.validation import (
    check_output_format,
    check_prompt_len,
    check_request,
    check_token_ids,
)
from services.gateway.worker_stream import StreamLimits
from services.gateway.workers import WorkerPool

if TYPE_CHECKING:
    from headrace.params import SamplingParams
    from headrace.telemetry import Span
    from services.gateway.config import GatewayConfig
    from services.gateway.fleet import Plan
    from services.gateway.generation import GenerationRequest, ServedModel, Sink
    from services.gateway.parsers import AnswerFormat
    from services.gateway.peers import Encoded

log = logging.getLogger("headrace.gateway")

_RETRY_AFTER_MS = 500


class GatewayPipeline:
    """A `Pipeline`. `open` it inside the loop; `drain`, then `close` it at the end."""

    def __init__(self, config: GatewayConfig, gateway_id: str) -> None:
        self._config = config
        self._tokenizer = TokenizerPeer(config.tokenizer, timeout_s=config.tokenizer_timeout_s)
        self._models = ModelTable(self._tokenizer, config.tool_parser)
        self._router = RouterPeer(
            config.router,
            gateway_id=gateway_id,
            timeout_s=config.route_timeout_s,
            on_fleet=self._models.update,
        )
        self._workers = WorkerPool(
            gateway_id=gateway_id,
            limits=StreamLimits(
                connect_timeout_s=config.worker_connect_timeout_s,
                resume_window_s=config.resume_window_s,
                heartbeat_timeout_s=config.heartbeat_timeout_s,
                idle_s=config.worker_idle_s,
            ),
            on_dead=self._router.report_failure,
        )
        self._migration = Migration(
            self._router,
            query=self._query_again,
            submit=self._submit,
            max_attempts=config.max_attempts,
            wait_s=config.worker_wait_s,
        )
        self._running: set[RunningRequest] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._is_leaving = False
        self._maintenance: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        """Requests on their way."""
        return len(self._running)

    def open(self) -> None:
        """Connect to the peers, and stay connected."""
        self._tokenizer.start()
        self._router.start()
        self._maintenance = asyncio.create_task(self._models.maintain(), name="models")

    def leave(self) -> None:
        """Not ready any more; requests are served as before, until `drain`."""
        self._is_leaving = True

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let the running ones end; those that take longer fail."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            log.warning("%d requests cut short after %g s", len(self._running), timeout_s)
            for running in list(self._running):
                running.fail(Unavailable("the gateway is shutting down", retry_after_ms=1000))

    async def close(self) -> None:
        """Cancel what runs, and disconnect."""
        self._is_draining = True
        for running in list(self._running):
            running.cancel()
        await cancel_and_wait(self._maintenance)
        await self._workers.close()
        await self._router.close()
        await self._tokenizer.close()

    def models(self) -> list[ServedModel]:
        return self._models.served()

    def answer_format(self, model: str) -> AnswerFormat:
        return self._models.find(model).format

    def check_serves(self, model: str, modality: str) -> None:
        check_modality(self._models.find(model).card, modality)

    def is_ready(self) -> bool:
        if self._is_leaving or self._is_draining:
            return False
        return self._tokenizer.connected and self._models.any_served

    async def start(self, request: GenerationRequest, sink: Sink, span: Span) -> RunningRequest:
        """See `Pipeline`. Raises InvalidArgument, NotFound, ResourceExhausted, Unavailable,
        DeadlineExceeded or Internal."""
        check_request(request)
        running = self._admit(request, sink, span)
        try:
            await self._begin(running)
        except BaseException:
            running.cancel()
            raise
        return running

    def _admit(self, request: GenerationRequest, sink: Sink, span: Span) -> RunningRequest:
        if self._is_draining:
            raise Unavailable("the gateway is shutting down", retry_after_ms=_RETRY_AFTER_MS)
        if len(self._running) >= self._config.max_requests:
            raise ResourceExhausted(
                f"{len(self._running)} requests run here already "
                f"(limit {self._config.max_requests})",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        limit_s = self._config.request_timeout_s
        running = RunningRequest(
            request,
            sink,
            span,
            timeout_s=min(request.timeout_s or limit_s, limit_s),
            mover=self._migration,
            on_over=self._forget,
        )
        self._running.add(running)
        self._is_idle.clear()
        return running

    def _forget(self, running: RunningRequest) -> None:
        self._running.discard(running)
        if not self._running:
            self._is_idle.set()

    async def _begin(self, running: RunningRequest) -> None:
        request = running.request
        model = running.model = self._models.find(request.model)
        check_modality(model.card, "text")
        if request.token_ids is not None:
            check_prompt_len(len(request.token_ids), model.card.context_len)
            check_token_ids(request.token_ids, model.table.vocab_size)
        check_output_format(request.output_format, model.card)
        encoded = running.encoded = await self._tokenize(running)
        check_prompt_len(encoded.num_tokens, model.card.context_len)
        sampling = _resolve(request.sampling, model.card.context_len - encoded.num_tokens)
        if request.bad_words:
            sampling = await self._without_bad_words(running, sampling)
        seed = sampling.seed or 0
        sequences = [
            Sequence(
                running,
                index,
                # The first keeps the request's own seed.
                dataclasses.replace(sampling, seed=seed_of(seed, index)) if index else sampling,
                model,
                request.stop,
            )
            for index in range(request.n)
        ]
        plan = await self._route(running, sampling)
        running.launch(sequences, Leg(self._router, plan, len(sequences)))
        for sequence in sequences:
            self._submit(running, sequence, plan)

    async def _tokenize(self, running: RunningRequest) -> Encoded:
        model = running.model
        span = telemetry.start_span("tokenize", running.span)
        try:
            request = await self._with_text(running)
            encoded = await self._tokenizer.encode(
                request,
                model.card,
                model.namespace_key,
                timeout_s=running.remaining_s(),
                traceparent=telemetry.traceparent(span),
            )
        except HeadraceError as error:
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            span.end()
        if encoded.tokenizer_digest != model.card.tokenizer_digest:
            raise self._models.distrust(model, encoded.tokenizer_digest)
        return encoded

    async def _with_text(self, running: RunningRequest) -> GenerationRequest:
        """The request, with its chat as text if more than its template must be at work."""
        request = running.request
        if not request.continue_final_message and not request.answer_prefix:
            return request
        text = await self._tokenizer.render(
            request, running.model.card.name, timeout_s=running.remaining_s()
        )
        if request.continue_final_message:
            text = prompt_text.continued(text, request.messages or ())
        return dataclasses.replace(
            request,
            messages=None,
            prompt=prompt_text.with_prefix(text, request.answer_prefix),
            add_special_tokens=False,
        )

    async def _without_bad_words(
        self, running: RunningRequest, sampling: SamplingParams
    ) -> SamplingParams:
        """Each word as a text's first, and behind a space."""
        forms = [form for word in running.request.bad_words for form in (word, f" {word}")]
        ids = await self._tokenizer.encode_words(
            forms, running.model.card.name, timeout_s=running.remaining_s()
        )
        sequences = dict.fromkeys((*sampling.bad_token_sequences, *ids))
        with_words = dataclasses.replace(sampling, bad_token_sequences=tuple(sequences))
        try:
            return with_words.validate()
        except InvalidArgument as error:
            raise InvalidArgument(f"bad_words: {error.message}", field="bad_words") from error

    async def _route(self, running: RunningRequest, sampling: SamplingParams) -> Plan:
        encoded = running.encoded
        span = telemetry.start_span("route", running.span)
        query = dataclasses.replace(
            self._query(running, encoded.token_ids),
            block_ids=encoded.block_ids,
            num_sequences=running.request.n,
            max_tokens=sampling.max_tokens or 0,
            traceparent=telemetry.traceparent(span),
        )
        try:
            plan = await self._router.route(query)
            span.set_attribute("headrace.worker_id", plan.worker.worker_id)
            span.set_attribute("headrace.matched_tokens", plan.matched_tokens)
        except HeadraceError as error:
            span.set_attribute("error.type", type(error).__name__)
            raise
        finally:
            span.end()
        return plan

    def _query(self, running: RunningRequest, token_ids: bytes) -> RouteQuery:
        request = running.request
        return RouteQuery(
            card=running.model.card,
            token_ids=token_ids,
            namespace_key=running.model.namespace_key,
            max_tokens=0,
            num_sequences=1,
            timeout_s=running.remaining_s(),
            tenant=request.tenant,
            priority=request.priority,
            session_id=request.session_id,
        )

    def _query_again(self, running: RunningRequest, sequence: Sequence) -> RouteQuery:
        """Where a sequence that lost its worker may go on."""
        left = (sequence.sampling.max_tokens or 0) - len(sequence.generated)
        return dataclasses.replace(
            self._query(running, running.encoded.token_ids + sequence.generated_ids),
            max_tokens=max(1, left),
            traceparent=telemetry.traceparent(running.span),
        )

    def _submit(self, running: RunningRequest, sequence: Sequence, plan: Plan) -> None:
        """Give `sequence`, which has its leg, to the plan's worker."""
        request = running.request
        submission = Submission(
            request_id=request.request_id,
            index=sequence.index,
            prompt_ids=running.encoded.token_ids,
            generated_ids=sequence.generated_ids,
            sampling=sequence.sampling,
            namespace_key=running.model.namespace_key,
            timeout_s=running.remaining_s(),
            traceparent=telemetry.traceparent(running.span),
            tenant=request.tenant,
            priority=request.priority,
            hand_off=plan.hand_off,
        )
        sequence.attempts += 1
        sequence.progressed = False
        sequence.ticket = self._workers.submit(plan.worker, submission, sequence)


def _resolve(sampling: SamplingParams, room: int) -> SamplingParams:
    """With a seed, and max_tokens within the `room` that the context leaves."""
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return dataclasses.replace(sampling, max_tokens=max_tokens, seed=seed)
