"""The Python client of a Headrace mesh, over gRPC.

    >>> import headrace
    >>> with headrace.Client(address) as client:
    ...     answer = client.generate("The mill wheel", max_tokens=4, temperature=0)
    >>> answer.usage.completion_tokens
    4

`Client` blocks, `AsyncClient` is the same for asyncio. Errors are those of
`headrace.errors`: `InvalidArgument` names the `field`, `ResourceExhausted` and
`Unavailable` say in `retry_after_ms` when to come back.
"""

from headrace.client.aio import AsyncClient, AsyncStream
from headrace.client.results import (
    Choice,
    Delta,
    Embeddings,
    Generation,
    Model,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from headrace.client.sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Delta",
    "Embeddings",
    "Generation",
    "Model",
    "Stream",
    "TokenLogprob",
    "TokenLogprobs",
    "Usage",
]
