"""What answers hold beside plain text, as OpenAI's own client reads it.

The model of these tests repeats what it is told: a prompt is the script of the answer.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.gateway.generation import GenerationRequest
from services.gateway.parsers import AnswerFormat

MODEL = "org/echo"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES = AnswerFormat("hermes", has_reasoning=False)
THINKING = AnswerFormat("hermes", has_reasoning=True)


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def last_request(edge: Any) -> GenerationRequest:
    request: GenerationRequest = edge.pipeline.generations[-1].request
    return request


async def reassembled(stream: Any) -> dict[str, Any]:
    """A stream's first choice, put together as clients do it."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "reason": None}
    async for chunk in stream:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                into = found["calls"].setdefault(call.index, {"id": "", "name": "", "args": ""})
                into["id"] += call.id or ""
                into["name"] += call.function.name or ""
                into["args"] += call.function.arguments or ""
            found["reason"] = choice.finish_reason or found["reason"]
    return found


async def test_a_tool_call_and_its_result(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.format = HERMES
    first = await client.chat.completions.create(
        **ask(f"Let me look. {CALL} {CALL}", tools=[WEATHER])
    )
    ChatCompletion.model_validate(first.model_dump(), strict=True)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["get_weather"] * 2  # type: ignore[union-attr]
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    assert len({call.id for call in message.tool_calls}) == 2
    assert json.loads(last_request(edge).tools_json) == [WEATHER]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls
    ]
    second = await client.chat.completions.create(
        model=MODEL,
        tools=[WEATHER],  # type: ignore[list-item]
        messages=[
            {"role": "user", "content": "Weather?"},
            message.model_dump(exclude_none=True),
            *results,
            {"role": "user", "content": "So?"},
        ],
    )
    assert second.choices[0].message.content == "So? "
    assert second.choices[0].finish_reason == "stop"
    told = [json.loads(m.message_json) for m in last_request(edge).messages or () if m.message_json]
    assert told[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert told[1]["tool_call_id"] == message.tool_calls[0].id


async def test_streamed_tool_calls(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.format = HERMES
    stream = await client.chat.completions.create(
        **ask(f"Wait: {CALL} {CALL}", tools=[WEATHER], stream=True)
    )
    found = await reassembled(stream)
    assert found["content"] == "Wait:"
    assert found["reason"] == "tool_calls"
    assert [found["calls"][i]["name"] for i in (0, 1)] == ["get_weather"] * 2
    assert json.loads(found["calls"][1]["args"]) == {"city": "Paris"}
    assert found["calls"][0]["id"].startswith("call_")


async def test_one_call_at_a_time(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.format = HERMES
    answer = await client.chat.completions.create(
        **ask(CALL + CALL, tools=[WEATHER], parallel_tool_calls=False)
    )
    assert len(answer.choices[0].message.tool_calls or ()) == 1


async def test_a_call_that_must_be_made(edge: Any, client: openai.AsyncOpenAI) -> None:
    edge.pipeline.format = HERMES
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for stream in (False, True):
        fields = ask('{"city": "Rome"}}', tools=[WEATHER], tool_choice=choice, stream=stream)
        answer = await client.chat.completions.create(**fields)
        request = last_request(edge)
        assert request.answer_prefix == '<tool_call>\n{"name": "get_weather", "arguments": '
        if stream:
            assert json.loads((await reassembled(answer))["calls"][0]["args"]) == {"city": "Rome"}
        else:
            assert answer.choices[0].message.content is None
            (call,) = answer.choices[0].message.tool_calls
            assert json.loads(call.function.arguments) == {"city": "Rome"}


async def test_special_tokens_are_shown_to_a_parser_that_needs_them(
    edge: Any, client: openai.AsyncOpenAI
) -> None:
    edge.pipeline.format = AnswerFormat("mistral")
    text = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {}}]'
    answer = await client.chat.completions.create(**ask(text, tools=[WEATHER]))
    assert not last_request(edge).skip_special_tokens
    (call,) = answer.choices[0].message.tool_calls or ()
    assert len(call.id) == 9


async def test_tools_of_a_model_that_calls_none(edge: Any, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--tool-parser") as caught:
        await client.chat.completions.create(**ask("x", tools=[WEATHER]))
    assert caught.value.param == "tools"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning(edge: Any, client: openai.AsyncOpenAI, stream: bool) -> None:
    edge.pipeline.format = THINKING
    text = f"<think> Hm, hm. </think> Hello {CALL}"
    answer = await client.chat.completions.create(**ask(text, stream=stream, tools=[WEATHER]))
    if stream:
        found = await reassembled(answer)
        assert (found["reasoning"], found["content"]) == ("Hm, hm.", "Hello")
        assert found["calls"][0]["name"] == "get_weather"
    else:
        message = answer.choices[0].message
        assert message.reasoning_content == "Hm, hm."
        assert message.content == "Hello"
        assert message.tool_calls[0].function.name == "get_weather"


async def test_a_thought_that_the_template_opened(edge: Any, client: openai.AsyncOpenAI) -> None:
    """The words of the prompt are the model's vocabulary: its last is an open thought."""
    edge.pipeline.format = THINKING
    edge.pipeline.max_steps = 3
    answer = await client.chat.completions.create(**ask("Hm </think> Yes <think>"))
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm", "Yes ")
    assert answer.choices[0].finish_reason == "length"


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    fields = ask("alpha béta", logprobs=True, top_logprobs=2, n=2)
    answer = await client.chat.completions.create(**fields)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["alpha ", "béta "]
    assert bytes(logprobs.content[1].bytes or ()).decode() == "béta "
    assert logprobs.content[0].logprob == -0.5
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["alpha ", "béta "]
    streamed: list[list[Any]] = [[], []]
    async for chunk in await client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content or ()
    assert streamed[1] == logprobs.content


async def test_completion_logprobs(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "one twö three", "logprobs": 1}
    answer = await client.completions.create(**fields)
    Completion.model_validate(answer.model_dump(), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["one ", "twö ", "three "]
    assert logprobs.text_offset == [0, 4, 8]
    assert logprobs.token_logprobs == [-1.0, -1.0, -1.0]
    assert logprobs.top_logprobs == [{word: -1.0} for word in logprobs.tokens]
    tokens: list[str] = []
    offsets: list[int] = []
    async for chunk in await client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens or ()
                offsets += choice.logprobs.text_offset or ()
    assert (tokens, offsets) == (logprobs.tokens, logprobs.text_offset)


async def test_echo(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="one two", echo=True, n=2)
    assert [choice.text for choice in answer.choices] == ["one twoone two "] * 2
    texts = ["", ""]
    async for chunk in await client.completions.create(
        model=MODEL, prompt="one two", echo=True, n=2, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["one twoone two "] * 2
    answer = await client.completions.create(model=MODEL, prompt="one two", echo=True, max_tokens=0)
    assert answer.choices[0].text == "one two"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


async def test_best_of(client: openai.AsyncOpenAI) -> None:
    """Of this model's sequences the last is the likeliest."""
    answer = await client.completions.create(model=MODEL, prompt="one", best_of=4, n=2, logprobs=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [
        (choice.logprobs.token_logprobs or [])[0] for choice in answer.choices if choice.logprobs
    ] == [-0.25, pytest.approx(-1 / 3)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


async def test_several_prompts(edge: Any, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["a b", "c"], n=2)
    assert [choice.text for choice in answer.choices] == ["a b ", "a b ", "c ", "c "]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 6
    texts = [""] * 4
    usage = None
    async for chunk in await client.completions.create(
        model=MODEL,
        prompt=["a b", "c"],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["a b ", "a b ", "c ", "c "]
    assert usage is not None
    assert usage.completion_tokens == 6
    assert edge.pipeline.generations[-1].request.request_id.endswith("-1")


async def test_one_of_several_prompts_fails(edge: Any, client: openai.AsyncOpenAI) -> None:
    from headrace.errors import ResourceExhausted

    edge.pipeline.fail_after = (1, ResourceExhausted("full", retry_after_ms=10))
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model=MODEL, prompt=["a b", "c d"])
    assert all(generation.cancelled.is_set() for generation in edge.pipeline.generations)


async def test_obfuscation_hides_lengths(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        **ask("a b c", stream=True, stream_options={"include_obfuscation": True})
    )
    padded = [c async for c in stream if c.choices and c.choices[0].delta.content]
    assert len(padded) == 3
    assert all(getattr(chunk, "obfuscation", "") for chunk in padded)


async def test_the_service_tier_is_named_if_asked_for(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**ask("x", service_tier="auto"))
    assert answer.service_tier == "default"
    async for chunk in await client.chat.completions.create(
        **ask("x", service_tier="auto", stream=True)
    ):
        assert chunk.service_tier == "default"


async def test_embeddings_are_refused_by_name(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does text, not embedding") as caught:
        await client.embeddings.create(model=MODEL, input="x")
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="nobody", input=["x"])
    with pytest.raises(openai.BadRequestError) as caught:
        await client.embeddings.create(model=MODEL, input="x", dimensions=0)
    assert caught.value.param == "dimensions"
