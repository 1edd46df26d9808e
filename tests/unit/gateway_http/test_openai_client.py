"""OpenAI's own client talks to the edge."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from headrace.errors import (
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

MODEL = "org/echo"
MESSAGES: list[Any] = [{"role": "user", "content": "alpha béta γάμμα 😀"}]
TEXT = "alpha béta γάμμα 😀 "


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    opening, *deltas, end, usage = chunks
    assert opening.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in deltas] == [
        "alpha ",
        "béta ",
        "γάμμα ",
        "😀 ",
    ]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert end.choices[0].finish_reason == "stop"
    assert end.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 4
    assert usage.usage.prompt_tokens_details is not None
    assert usage.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_stream_without_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert "usage" not in chunks[0].model_fields_set


async def test_several_sequences(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {TEXT}
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, stream=True)
    texts = ["", "", ""]
    roles = []
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == [TEXT] * 3
    assert roles == [0, 1, 2]


async def test_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="one two", max_tokens=1)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "one "
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


async def test_completion_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt=[5, 6], stream=True, stream_options={"include_usage": True}
    )
    *chunks, end, usage = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["<5>", "<6>"]
    assert end.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 4


async def test_completion_stops_after_16_tokens_by_default(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=[1] * 40)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    model = await client.models.retrieve(MODEL)
    assert model == models[0]
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "nobody" in caught.value.message
    assert caught.value.request_id
    assert caught.value.request_id.startswith("req-")


async def test_empty_messages(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=[])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (InvalidArgument("prompt too long", field="messages"), openai.BadRequestError, 400),
        (ResourceExhausted("full", retry_after_ms=1500), openai.RateLimitError, 429),
        (Unavailable("no worker"), openai.InternalServerError, 503),
        (DeadlineExceeded("too late"), openai.InternalServerError, 504),
        (Internal("abc123"), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("when", ["at start", "before the first token"])
async def test_errors_before_the_first_token(
    edge: Any,
    client: openai.AsyncOpenAI,
    error: Any,
    kind: type[openai.APIStatusError],
    status: int,
    when: str,
    stream: bool,
) -> None:
    if when == "at start":
        edge.pipeline.refusal = error
    else:
        edge.pipeline.fail_after = (0, error)
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert caught.value.status_code == status
    assert error.message in caught.value.message
    assert caught.value.param == (error.field or None)
    if error.retry_after_ms:
        assert caught.value.response.headers["retry-after"] == "2"


async def test_errors_name_fields_as_the_api_does(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.refusal = InvalidArgument("too long", field="prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert caught.value.param == "messages"
    edge.pipeline.refusal = InvalidArgument("no such token", field="token_ids")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt=[1])
    assert caught.value.param == "prompt"


async def test_error_within_a_stream(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.pause_after = 2
    edge.pipeline.fail_after = (3, Unavailable("the worker was lost"))
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    text = ""
    while text != "alpha béta ":
        text += (await anext(stream)).choices[0].delta.content or ""
    edge.pipeline.generations[0].resume()
    assert (await anext(stream)).choices[0].delta.content == "γάμμα "
    with pytest.raises(openai.APIError, match="the worker was lost"):
        await anext(stream)


async def test_unexpected_fault_is_an_incident(
    edge: Any, client: openai.AsyncOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    edge.pipeline.refusal = ZeroDivisionError("secret detail")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert "incident" in caught.value.message
    assert "secret" not in caught.value.message
    assert "secret detail" in caplog.text


async def test_closing_a_stream_cancels(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.pause_after = 2
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    await stream.close()
    async with asyncio.timeout(20):
        await edge.pipeline.generations[0].cancelled.wait()


async def test_many_streams_at_once(client: openai.AsyncOpenAI) -> None:
    async def one(number: int) -> str:
        prompt = [number] * 50
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, stream=True, max_tokens=200
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    texts = await asyncio.gather(*(one(number) for number in range(32)))
    assert texts == [f"<{number}>" * 50 for number in range(32)]
