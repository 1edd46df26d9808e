"""What the client sends for what it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.client import requests
from headrace.errors import InvalidArgument
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import types_pb2


def test_each_kind_of_input() -> None:
    assert requests.generate_request("hi", "m", {}) == pb.GenerateRequest(model="m", prompt="hi")
    assert requests.generate_request([3, 4], "m", {}).token_ids.ids == [3, 4]
    plain = {"role": "user", "content": "hi"}
    rich = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    first, second = requests.generate_request([plain, rich], "m", {}).chat.messages
    assert first == pb.Message(role="user", content="hi")
    assert json.loads(second.message_json) == rich


def test_every_option_has_its_place() -> None:
    options: Any = {
        "max_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
        "min_p": 0.25, "seed": 9, "stop_token_ids": [1], "ignore_eos": True,
        "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "logit_bias": {7: -1.0}, "logprobs": 2, "prompt_logprobs": 1,
        "n": 2, "stop": "end", "bad_words": ["bad"], "return_token_texts": True,
        "skip_special_tokens": False, "add_special_tokens": False, "priority": -3, "user": "u",
        "session_id": "s", "tools": [{"type": "function"}], "template_args": {"a": 1},
        "continue_final_message": True, "add_generation_prompt": False,
    }  # fmt: skip
    known = requests.Options.__annotations__.keys()
    assert options.keys() == known - {"model", "timeout_s"}
    request = requests.generate_request([{"role": "user", "content": "hi"}], "m", options)
    assert request.sampling == types_pb2.SamplingParams(
        max_tokens=5, min_tokens=1, temperature=0.5, top_p=0.5, top_k=3, min_p=0.25, seed=9,
        stop_token_ids=[1], ignore_eos=True, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={7: -1.0}, logprobs=2, prompt_logprobs=1,
    )  # fmt: skip
    assert (request.n, list(request.stop), list(request.bad_words)) == (2, ["end"], ["bad"])
    assert not request.skip_special_tokens
    assert request.HasField("skip_special_tokens")
    assert json.loads(request.chat.tools_json) == [{"type": "function"}]
    assert json.loads(request.chat.template_args_json) == {"a": 1}
    assert request.chat.continue_final_message
    assert (request.priority, request.user, request.session_id) == (-3, "u", "s")


def test_none_means_left_out() -> None:
    options: Any = {"max_tokens": None, "stop": None}
    assert requests.generate_request("x", "", options) == pb.GenerateRequest(prompt="x")


@pytest.mark.parametrize(
    ("options", "field"),
    [({"max_tokens": -1}, "max_tokens"), ({"temperature": "hot"}, "temperature"),
     ({"n": 1.5}, "n"), ({"nonsense": 1}, "nonsense"), ({"tools": {1, 2}}, "tools"),
     ({"stop": 5}, "stop"), ({"stop_token_ids": [-1]}, "stop_token_ids")],
)  # fmt: skip
def test_what_can_t_be_sent_is_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        requests.generate_request("x", "m", options)
    assert caught.value.field == field


def test_an_input_that_is_none() -> None:
    given: Any = [1, "x"]
    with pytest.raises(InvalidArgument):
        requests.generate_request(given, "m", {})
