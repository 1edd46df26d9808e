"""The client for asyncio: `sync.Client` with awaits. What it sends and returns is `requests`
and `results`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Unpack

import grpc

from headrace.client import connection, requests, results
from headrace.client.connection import Attempts, Tls
from headrace.errors import HeadraceError
from headrace.rpc.errors import from_proto
from headrace.v1 import inference_pb2 as pb
from headrace.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
    from types import TracebackType

    from headrace.client.requests import Input, Options
    from headrace.client.results import Delta, Embeddings, Generation, Model


class AsyncStream:
    """An answer as it comes: iterate over its deltas. Leaving the context cancels the call, and
    the mesh stops working on it.

    Raises a HeadraceError while iterating.
    """

    def __init__(self, deltas: AsyncGenerator[Delta, None]) -> None:
        self._deltas = deltas

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._deltas

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is not over. Safe at any time."""
        await self._deltas.aclose()


class AsyncClient:
    """A mesh's gateway, or all gateways behind one name. Make and use it inside one loop.

        >>> async def names():
        ...     async with AsyncClient(address) as client:
        ...         return [model.name for model in await client.models()]
        >>> asyncio.run(names())
        ['smollm2-135m']

    Parameters, retries and errors are those of `Client`.
    """

    def __init__(
        self,
        address: str = connection.DEFAULT_ADDRESS,
        *,
        model: str = "",
        api_key: str | None = None,
        tls: Tls = False,
        timeout_s: float = connection.DEFAULT_TIMEOUT_S,
        max_retries: int = connection.DEFAULT_RETRIES,
    ) -> None:
        keys = connection.credentials(tls)
        options = connection.CHANNEL_OPTIONS
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if keys is None
            else grpc.aio.secure_channel(address, keys, options)
        )
        self._stub: Any = InferenceServiceStub(self._channel)
        self._model = model
        self._metadata = connection.call_metadata(api_key)
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect; what runs is cancelled."""
        await self._channel.close()

    async def generate(self, given: Input, **options: Unpack[Options]) -> Generation:
        """A whole answer to text, messages or token ids. Raises a HeadraceError."""
        collector = results.Collector()
        async with await self.stream(given, **options) as stream:
            async for delta in stream:
                collector.add(delta)
        return collector.result()

    async def stream(self, given: Input, **options: Unpack[Options]) -> AsyncStream:
        """An answer as it comes.

        >>> async def first_text():
        ...     async with AsyncClient(address) as client:
        ...         async with await client.stream("Once upon", max_tokens=50) as stream:
        ...             async for delta in stream:
        ...                 return len(delta.token_ids)
        >>> asyncio.run(first_text())
        1
        """
        attempts = self._attempts(options)
        request = requests.generate_request(given, await self._model_of(options), options)
        return AsyncStream(self._deltas(self._stub.Generate, request, attempts, results.delta_of))

    async def batch(
        self, given: Sequence[Input], **options: Unpack[Options]
    ) -> list[Generation | HeadraceError]:
        """A whole answer to each input, in order, or the error of those that failed."""
        attempts = self._attempts(options)
        model = await self._model_of(options)
        request = pb.GenerateBatchRequest(
            requests=[requests.generate_request(one, model, options) for one in given]
        )
        collected: list[results.Collector | HeadraceError] = [results.Collector() for _ in given]
        async for response in self._deltas(self._stub.GenerateBatch, request, attempts, _itself):
            if response.HasField("error"):
                collected[response.request_index] = from_proto(response.error)
                continue
            collector = collected[response.request_index]
            if isinstance(collector, results.Collector):
                collector.add(results.delta_of(response.response))
        return [one if isinstance(one, HeadraceError) else one.result() for one in collected]

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Embeddings:
        """A vector for each text or list of token ids."""
        name = model or await self._model_of({})
        request = requests.embed_request(inputs, name, dimensions, truncate)
        return results.embeddings_of(await self._unary(self._stub.Embed, request))

    async def models(self) -> list[Model]:
        """What is served now."""
        answer = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [results.model_of(info) for info in answer.models]

    def _attempts(self, options: Options) -> Attempts:
        return Attempts(options.get("timeout_s", self._timeout_s), self._max_retries)

    async def _model_of(self, options: Options) -> str:
        named = options.get("model") or self._model
        return named or connection.only_model([model.name for model in await self.models()])

    async def _unary(self, method: Any, request: Any) -> Any:
        attempts = self._attempts({})
        while True:
            try:
                return await method(
                    request, timeout=attempts.remaining_s(), metadata=self._metadata
                )
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(attempts.wait_s(connection.error_of(error)))

    async def _deltas(
        self, method: Any, request: Any, attempts: Attempts, convert: Callable[[Any], Any]
    ) -> AsyncGenerator[Any, None]:
        """The call's messages; tried again as long as none came."""
        has_begun = False
        while True:
            call = method(request, timeout=attempts.remaining_s(), metadata=self._metadata)
            try:
                async for response in call:
                    has_begun = True
                    yield convert(response)
                return
            except grpc.aio.AioRpcError as error:
                ours = connection.error_of(error)
                if has_begun:
                    raise ours from None
                await asyncio.sleep(attempts.wait_s(ours))
            finally:
                # Also when the caller leaves the iteration.
                call.cancel()


def _itself(message: Any) -> Any:
    return message
