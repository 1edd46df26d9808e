"""What becomes of a chat and of words on their way to the tokenizer, over real streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import openai
import pytest
from opentelemetry.trace import INVALID_SPAN

from headrace.blocks import unpack_tokens
from headrace.errors import InvalidArgument, NotFound, StartupError
from headrace.params import SamplingParams
from services.gateway.generation import ChatMessage, GenerationRequest, OutputFormat
from services.gateway.ids import new_request_id
from services.gateway.parsers import AnswerFormat

USER = ChatMessage("user", "hi")


def chat(*messages: ChatMessage, **values: Any) -> GenerationRequest:
    return GenerationRequest(
        new_request_id(),
        "bytes",
        messages=messages or (USER,),
        sampling=SamplingParams(max_tokens=3),
        **values,
    )


async def prompt_of(mesh: Any, request: GenerationRequest) -> str:
    """The prompt that a worker was given."""
    sink = mesh.new_sink()
    generation = await mesh.pipeline.start(request, sink, INVALID_SPAN)
    await mesh.eventually(lambda: sink.is_over)
    packed = mesh.workers[0].submissions[-1].prompt_ids
    assert generation.prompt_ids == packed
    assert generation.vocabulary.spelled(257) == b"<tool>"
    assert generation.vocabulary.spelled(ord("a")) == b"a"
    assert generation.vocabulary.spelled(300) == b""
    return bytes(unpack_tokens(packed)).decode()


async def test_all_that_a_template_is_given(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    whole = '{"role":"assistant","content":"","tool_calls":[]}'
    await prompt_of(
        mesh,
        chat(
            USER,
            ChatMessage("assistant", "", whole),
            tools_json="[{}]",
            template_args_json='{"a":1}',
            add_generation_prompt=False,
        ),
    )
    given = mesh.tokenizer.encodes[-1].encode.chat
    assert (given.messages[0].role, given.messages[0].content) == ("user", "hi")
    assert (given.messages[1].message_json, given.messages[1].role) == (whole.encode(), "")
    assert given.tools_json == b"[{}]"
    assert given.template_args_json == b'{"a":1}'
    assert not given.add_generation_prompt


async def test_an_answer_that_begins_as_it_must(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.tokenizer.opening = "bot:"
    assert await prompt_of(mesh, chat(answer_prefix="{")) == "user:hi\nbot:{"
    assert mesh.tokenizer.encodes[-1].encode.skip_special_tokens
    mesh.tokenizer.opening = "bot:<think>\n"
    prompt = await prompt_of(mesh, chat(answer_prefix="{"))
    assert prompt == "user:hi\nbot:<think>\n\n</think>\n\n{"


async def test_a_last_message_that_goes_on(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    options: Any = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = await prompt_of(mesh, chat(USER, ChatMessage("bot", "Well, "), **options))
    assert prompt == "user:hi\nbot:Well,"
    with pytest.raises(InvalidArgument) as caught:
        await prompt_of(mesh, chat(USER, ChatMessage("bot", " "), **options))
    assert caught.value.field == "continue_final_message"


async def test_bad_words_become_token_sequences(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    await prompt_of(mesh, chat(bad_words=("ab", "c")))
    sampling = mesh.workers[0].submissions[-1].sampling
    found = [bytes(sequence.ids) for sequence in sampling.bad_token_sequences]
    assert found == [b"ab", b" ab", b"c", b" c"]
    with pytest.raises(InvalidArgument, match="bad_words: ") as caught:
        await prompt_of(mesh, chat(bad_words=("x" * 40,)))
    assert caught.value.field == "bad_words"


async def test_special_tokens_are_shown_if_they_may_be(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    mesh.workers[0].script = lambda position: mesh.EOS
    for skips, text in ((True, ""), (False, "<end>" * 3)):
        sink = mesh.new_sink()
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        request = dataclasses.replace(chat(skip_special_tokens=skips), sampling=sampling)
        await mesh.pipeline.start(request, sink, INVALID_SPAN)
        await mesh.eventually(lambda sink=sink: sink.is_over)
        assert sink.texts[0] == text


async def test_output_formats_are_refused_by_name(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    with pytest.raises(InvalidArgument, match="json_object") as caught:
        await prompt_of(mesh, chat(output_format=OutputFormat("json_object")))
    assert caught.value.field == "response_format"


async def test_a_models_format_is_that_of_its_template(mesh: Any) -> None:
    mesh.tokenizer.template = "… <tool_call> … </think>"
    await mesh.start(num_workers=1)
    expected = AnswerFormat("hermes", has_reasoning=True)
    assert mesh.pipeline.answer_format("bytes") == expected
    mesh.pipeline.check_serves("bytes", "text")
    with pytest.raises(InvalidArgument):
        mesh.pipeline.check_serves("bytes", "embedding")
    with pytest.raises(NotFound):
        mesh.pipeline.answer_format("nobody")


async def test_a_gateway_that_is_told_of_a_format(mesh: Any) -> None:
    await mesh.start(num_workers=1, tool_parser=("bytes=mistral",))
    assert mesh.pipeline.answer_format("bytes") == AnswerFormat("mistral")


async def test_a_parser_that_is_not_there(mesh: Any) -> None:
    with pytest.raises(StartupError, match="--tool-parser must be one of hermes"):
        await mesh.start(num_workers=1, tool_parser=("no",))


async def test_a_tool_call_from_tokens_to_a_client(mesh: Any) -> None:
    """A worker's tokens are the bytes of a call; the mark of one is cut at every place."""
    mesh.tokenizer.template = "<tool_call>"
    await mesh.start(num_workers=1)
    said = b'Ok. <tool_call>{"name": "f", "arguments": {"x": "\xc3\xa9"}}</tool_call>'
    script = [*said, mesh.EOS]
    mesh.workers[0].script = lambda position: script[position]
    tool: Any = {"type": "function", "function": {"name": "f"}}
    url = f"http://127.0.0.1:{mesh.gateway.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        options: Any = {
            "model": "bytes",
            "messages": [{"role": "user", "content": "x"}],
            "tools": [tool],
        }
        whole = (await client.chat.completions.create(**options)).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content == "Ok."
        assert whole.message.tool_calls[0].function.arguments == '{"x": "é"}'
        calls, text = [], ""
        async for chunk in await client.chat.completions.create(stream=True, **options):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                calls += choice.delta.tool_calls or ()
        assert text == "Ok."
        assert [call.function.name for call in calls] == ["f", None]
        assert "".join(call.function.arguments for call in calls) == '{"x": "é"}'
