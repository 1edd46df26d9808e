"""The blocking client. What it sends and returns is `requests` and `results`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Unpack

import grpc

from headrace.client import connection, requests, results
from headrace.client.connection import Attempts, Tls
from headrace.errors import HeadraceError
from headrace.rpc.errors import from_proto
from headrace.v1 import inference_pb2 as pb
from headrace.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from types import TracebackType

    from headrace.client.requests import Input, Options
    from headrace.client.results import Delta, Embeddings, Generation, Model


class Stream:
    """An answer as it comes: iterate over its deltas. Leaving the iteration or the context
    cancels the call, and the mesh stops working on it.

    Raises a HeadraceError while iterating.
    """

    def __init__(self, deltas: Generator[Delta, None, None]) -> None:
        self._deltas = deltas

    def __iter__(self) -> Iterator[Delta]:
        return self._deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not over. Safe at any time."""
        self._deltas.close()


class Client:
    """A mesh's gateway, or all gateways behind one name. Threads may share it.

        >>> client = Client(address, timeout_s=30)
        >>> [model.name for model in client.models()]
        ['smollm2-135m']

    A call that fails before its answer began is tried again, at most `max_retries`
    times, where that is safe. `tls`: True for the system's roots, or roots as PEM;
    `api_key` goes along as a bearer token. Close it, or use it as a context.
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
            grpc.insecure_channel(address, options)
            if keys is None
            else grpc.secure_channel(address, keys, options)
        )
        self._stub: Any = InferenceServiceStub(self._channel)
        self._model = model
        self._metadata = connection.call_metadata(api_key)
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; what runs is cancelled."""
        self._channel.close()

    def generate(self, given: Input, **options: Unpack[Options]) -> Generation:
        """A whole answer to text, messages or token ids.

            >>> messages = [{"role": "user", "content": "Name a river."}]
            >>> client.generate(messages, max_tokens=8).choices[0].finish_reason
            'length'

        Raises a HeadraceError.
        """
        collector = results.Collector()
        for delta in self.stream(given, **options):
            collector.add(delta)
        return collector.result()

    def stream(self, given: Input, **options: Unpack[Options]) -> Stream:
        """An answer as it comes.

        >>> with client.stream("Once upon a time", max_tokens=3, seed=1) as stream:
        ...     text = "".join(delta.text for delta in stream)
        >>> text == client.generate("Once upon a time", max_tokens=3, seed=1).text
        True
        """
        attempts = self._attempts(options)
        request = requests.generate_request(given, self._model_of(options), options)
        return Stream(self._deltas(self._stub.Generate, request, attempts, results.delta_of))

    def batch(
        self, given: Sequence[Input], **options: Unpack[Options]
    ) -> list[Generation | HeadraceError]:
        """A whole answer to each input, in order, or the error of those that failed.

        >>> good, bad = client.batch(["The river", ""], max_tokens=2)
        >>> good.usage.completion_tokens, bad.field
        (2, 'requests[1].prompt')
        """
        attempts = self._attempts(options)
        model = self._model_of(options)
        request = pb.GenerateBatchRequest(
            requests=[requests.generate_request(one, model, options) for one in given]
        )
        collected: list[results.Collector | HeadraceError] = [results.Collector() for _ in given]
        for response in self._deltas(self._stub.GenerateBatch, request, attempts, _itself):
            if response.HasField("error"):
                collected[response.request_index] = from_proto(response.error)
                continue
            collector = collected[response.request_index]
            if isinstance(collector, results.Collector):
                collector.add(results.delta_of(response.response))
        return [one if isinstance(one, HeadraceError) else one.result() for one in collected]

    def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        model: str = "",
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> Embeddings:
        """A vector for each text or list of token ids."""
        name = model or self._model_of({})
        request = requests.embed_request(inputs, name, dimensions, truncate)
        return results.embeddings_of(self._unary(self._stub.Embed, request))

    def models(self) -> list[Model]:
        """What is served now."""
        answer = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [results.model_of(info) for info in answer.models]

    def _attempts(self, options: Options) -> Attempts:
        return Attempts(options.get("timeout_s", self._timeout_s), self._max_retries)

    def _model_of(self, options: Options) -> str:
        named = options.get("model") or self._model
        return named or connection.only_model([model.name for model in self.models()])

    def _unary(self, method: Any, request: Any) -> Any:
        attempts = self._attempts({})
        while True:
            try:
                return method(request, timeout=attempts.remaining_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.wait_s(connection.error_of(error)))

    def _deltas(
        self, method: Any, request: Any, attempts: Attempts, convert: Callable[[Any], Any]
    ) -> Generator[Any, None, None]:
        """The call's messages; tried again as long as none came."""
        has_begun = False
        while True:
            call = method(request, timeout=attempts.remaining_s(), metadata=self._metadata)
            try:
                for response in call:
                    has_begun = True
                    yield convert(response)
                return
            except grpc.RpcError as error:
                ours = connection.error_of(error)
                if has_begun:
                    raise ours from None
                time.sleep(attempts.wait_s(ours))
            finally:
                # Also when the caller leaves the iteration.
                call.cancel()


def _itself(message: Any) -> Any:
    return message
