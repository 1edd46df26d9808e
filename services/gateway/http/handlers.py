"""What each route does. Thin: bytes in, the pipeline, bytes out.

A generation that its handler leaves, for whatever reason (the client went away,
the stream was cut, an error), is cancelled before the handler returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from headrace.errors import InvalidArgument
from services.gateway import tracing
from services.gateway.generation import Usage
from services.gateway.http import openapi, parse, responses
from services.gateway.http.collect import CollectingSink
from services.gateway.http.errors import (
    JSON,
    REQUEST_ID_HEADER,
    HttpError,
    Problem,
    body_too_long,
)
from services.gateway.http.request import ParsedRequest, with_tools
from services.gateway.http.responses import Choice, EventTemplate, ResponseHead
from services.gateway.http.several import Several
from services.gateway.http.sse import StreamingSink, ViewingSink
from services.gateway.http.view import View

if TYPE_CHECKING:
    from headrace.telemetry import Span
    from services.gateway.generation import Generation, Pipeline, Sink

#: Where the request's id stands while it is handled.
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)

_EVENT_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would collect the events otherwise.
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Api:
    """One of the two generation APIs: how it is read and how it answers."""

    id_prefix: str
    #: What this API calls our fields.
    fields: Mapping[str, str]
    parse: Callable[[bytes, str], ParsedRequest]
    body: Callable[[ResponseHead, Sequence[Choice], Usage], bytes]
    events: Callable[..., EventTemplate]


CHAT = Api(
    "chatcmpl",
    {"prompt": "messages", "bad_token_sequences": "bad_words"},
    parse.parse_chat,
    responses.chat_body,
    responses.chat_events,
)
COMPLETIONS = Api(
    "cmpl",
    {"token_ids": "prompt", "bad_token_sequences": "bad_words"},
    parse.parse_completion,
    responses.completion_body,
    responses.completion_events,
)


class _EventStream(web.StreamResponse):
    """Its headers wait for the first write, as those of an answer in one piece do: a packet less.

    Where aiohttp does not know the attribute they are sent at once."""

    _send_headers_immediately = False


class Handlers:
    """The routes' handlers over one pipeline. Limits are in bytes."""

    def __init__(
        self, pipeline: Pipeline, *, max_body_len: int, max_client_buffer_len: int
    ) -> None:
        self._pipeline = pipeline
        self._max_body_len = max_body_len
        self._max_client_buffer_len = max_client_buffer_len

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        return await self._generate(request, CHAT)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        return await self._generate(request, COMPLETIONS)

    async def embeddings(self, request: web.Request) -> web.Response:
        """POST /v1/embeddings"""
        model = parse.parse_embedding(await self._read_body(request))
        self._pipeline.check_serves(model, "embedding")
        raise InvalidArgument(f"model {model!r} can't be asked for embeddings yet", field="model")

    async def openapi(self, request: web.Request) -> web.Response:
        """GET /openapi.json"""
        return web.Response(body=openapi.document(), content_type=JSON)

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models"""
        return web.Response(body=responses.models_body(self._pipeline.models()), content_type=JSON)

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}"""
        name = request.match_info["id"]
        for model in self._pipeline.models():
            if model.name == name:
                return web.Response(body=responses.model_body(model), content_type=JSON)
        raise HttpError(
            Problem(404, f"there is no model {name!r}", param="model", code="model_not_found")
        )

    async def live(self, request: web.Request) -> web.Response:
        """GET /health/live"""
        return web.json_response({"status": "live"})

    async def ready(self, request: web.Request) -> web.Response:
        """GET /health/ready"""
        if self._pipeline.is_ready():
            return web.json_response({"status": "ready"})
        reason = (
            "the tokenizer, the router or every worker is out of reach"
            if self._pipeline.models()
            else "no worker serves a model yet"
        )
        return web.json_response({"status": "not ready", "reason": reason}, status=503)

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """Answer `Expect: 100-continue`: ask for the body only if it may come."""
        if request.version >= HttpVersion11 and not self._is_too_long(request):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # What follows is the first byte of the answer, as aiohttp counts.
            request.writer.output_size = 0
        return None

    async def _generate(self, request: web.Request, api: Api) -> web.StreamResponse:
        request_id = request[REQUEST_ID]
        span = tracing.request_span(traceparent=request.headers.get("traceparent", ""))
        try:
            parsed = api.parse(await self._read_body(request), request_id)
            parsed, view = self._view(parsed)
            answer = self._stream if parsed.stream else self._complete
            response, outcome = await answer(request, api, parsed, view, span)
        except InvalidArgument as error:
            tracing.finish(span, error)
            # Beyond the parser, fields have our names.
            field = api.fields.get(error.field, error.field)
            raise InvalidArgument(error.message, field=field) from error
        except BaseException as error:
            tracing.finish(span, error)
            raise
        tracing.finish(span, outcome)
        return response

    def _view(self, parsed: ParsedRequest) -> tuple[ParsedRequest, View | None]:
        """The request as its model must be given it; a view if plain text is not all of it."""
        if parsed.generation.messages is None:
            return parsed, View(parsed) if parsed.wishes.any else None
        answer = self._pipeline.answer_format(parsed.generation.model)
        if not parsed.wishes.any and not answer.has_reasoning:
            return parsed, None
        parsed, parser = with_tools(parsed, answer)
        return parsed, View(parsed, has_reasoning=answer.has_reasoning, parser=parser)

    async def _complete(
        self,
        request: web.Request,
        api: Api,
        parsed: ParsedRequest,
        view: View | None,
        span: Span,
    ) -> tuple[web.Response, Usage]:
        head = _head(api, parsed)
        sink = CollectingSink(asyncio.get_running_loop(), n=parsed.num_choices, view=view)
        running: list[Generation] = []
        try:
            await self._start(parsed, sink, view, span, running)
            usage = await sink.done
        except BaseException:
            sink.close()
            _cancel(running)
            raise
        if view is not None:
            usage = view.usage(usage)
        body = api.body(head, sink.choices(), usage)
        return web.Response(body=body, content_type=JSON), usage

    async def _stream(
        self,
        request: web.Request,
        api: Api,
        parsed: ParsedRequest,
        view: View | None,
        span: Span,
    ) -> tuple[web.StreamResponse, Usage | BaseException]:
        chunked = request.version >= HttpVersion11
        sink = self._streaming_sink(api, parsed, view, chunked=chunked)
        response = _EventStream(
            headers={**_EVENT_STREAM_HEADERS, REQUEST_ID_HEADER: request[REQUEST_ID]}
        )
        if chunked:
            response.enable_chunked_encoding()
        else:
            # Only the connection's end tells an HTTP/1.0 client that the stream is over.
            response.force_close()
        running: list[Generation] = []
        try:
            await self._start(parsed, sink, view, span, running)
            # Until the first token a failure still gets a status of its own.
            await sink.started
            if sink.error is not None:
                raise sink.error
            await response.prepare(request)
            # The headers go with the first events, in one packet.
            await response.write(sink.take())
            sink.attach(request.transport)
            await sink.done
        finally:
            sink.close()
            if sink.usage is None:
                _cancel(running)
        outcome = sink.usage or sink.error or ConnectionResetError("the client went away")
        return response, outcome

    def _streaming_sink(
        self, api: Api, parsed: ParsedRequest, view: View | None, *, chunked: bool
    ) -> StreamingSink:
        template = api.events(
            _head(api, parsed), n=parsed.num_choices, include_usage=parsed.include_usage
        )
        loop, limit = asyncio.get_running_loop(), self._max_client_buffer_len
        if view is None:
            return StreamingSink(template, loop, chunked=chunked, max_buffer_len=limit)
        return ViewingSink(template, loop, view=view, chunked=chunked, max_buffer_len=limit)

    async def _start(
        self,
        parsed: ParsedRequest,
        sink: Sink,
        view: View | None,
        span: Span,
        running: list[Generation],
    ) -> None:
        """Start all its prompts' generations, and put them into `running` as they go."""
        several = None
        if len(parsed.generations) > 1:
            several = Several(sink, len(parsed.generations))
        for at, request in enumerate(parsed.generations):
            part = sink if several is None else several.part(at * request.n)
            generation = await self._pipeline.start(request, part, span)
            running.append(generation)
            if view is not None:
                # Its first token can't have come: nothing was awaited since it was submitted.
                view.begin(at, generation)
            if several is not None and several.failed:
                return

    async def _read_body(self, request: web.Request) -> bytes:
        if self._is_too_long(request):
            raise body_too_long(request.content_length or 0, self._max_body_len)
        body = bytearray()
        try:
            while piece := await request.content.readany():
                body += piece
                if len(body) > self._max_body_len:
                    raise body_too_long(len(body), self._max_body_len, at_least=True)
        except web.RequestPayloadError as error:
            raise InvalidArgument(f"the body can't be read: {error}") from error
        return bytes(body)

    def _is_too_long(self, request: web.Request) -> bool:
        return (request.content_length or 0) > self._max_body_len


def _head(api: Api, parsed: ParsedRequest) -> ResponseHead:
    generation = parsed.generation
    return ResponseHead(
        f"{api.id_prefix}-{generation.request_id.removeprefix('req-').partition('-')[0]}",
        int(time.time()),
        generation.model,
        parsed.names_tier,
    )


def _cancel(running: list[Generation]) -> None:
    for generation in running:
        generation.cancel()


def text_routes(handlers: Handlers) -> list[web.RouteDef]:
    """The routes of the modality "text"."""
    expect = handlers.expect
    return [
        web.post("/v1/chat/completions", handlers.chat_completions, expect_handler=expect),
        web.post("/v1/completions", handlers.completions, expect_handler=expect),
    ]


def embedding_routes(handlers: Handlers) -> list[web.RouteDef]:
    """The routes of the modality "embedding"."""
    return [web.post("/v1/embeddings", handlers.embeddings, expect_handler=handlers.expect)]
