"""The OpenAPI description of this edge, as it is served at /openapi.json.

Bodies are made from the types that requests are decoded into (`schema`), with the
limits that their values have; answers are described by hand. A test holds that it
is valid, and that every route is in it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from headrace import __version__
from headrace.params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEQUENCES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
)
from services.gateway.http import schema
from services.gateway.http.tools import MAX_TOOLS
from services.gateway.validation import MAX_BAD_WORDS, MAX_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Mapping

_UINT32 = (1 << 32) - 1
_REF = "#/components/schemas/{name}"

#: Limits of parameters, in JSON Schema's words.
_LIMITS: dict[str, dict[str, Any]] = {
    "best_of": {"minimum": 1, "maximum": MAX_SEQUENCES},
    "bad_words": {"maxItems": MAX_BAD_WORDS},
    "dimensions": {"minimum": 1, "maximum": _UINT32},
    "encoding_format": {"enum": ["float", "base64"]},
    "frequency_penalty": {"minimum": -MAX_PENALTY, "maximum": MAX_PENALTY},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "max_completion_tokens": {"minimum": 1, "maximum": _UINT32},
    "max_tokens": {"minimum": 0, "maximum": _UINT32},
    "messages": {"minItems": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "min_tokens": {"minimum": 0, "maximum": _UINT32},
    "n": {"minimum": 1, "maximum": MAX_SEQUENCES},
    "presence_penalty": {"minimum": -MAX_PENALTY, "maximum": MAX_PENALTY},
    "priority": {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": MAX_REPETITION_PENALTY},
    "seed": {"minimum": -(1 << 63), "maximum": (1 << 64) - 1},
    "stop": {"maxItems": MAX_STOP_STRINGS, "minLength": 1},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKEN_IDS},
    "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
    "tools": {"maxItems": MAX_TOOLS},
    "top_k": {"minimum": -1, "maximum": _UINT32},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
}
#: The types of JSON Schema that a limit's word is for.
_LIMITED = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "exclusiveMinimum": ("integer", "number"),
    "minItems": ("array",),
    "maxItems": ("array",),
    "minLength": ("string",),
    "enum": ("string",),
}

_ERRORS = {
    "400": "The request is wrong; `param` names what",
    "404": "There is no such model",
    "405": "The route takes other methods",
    "413": "The body is too long",
    "429": "Too many requests; Retry-After says when to come back",
    "499": "The client went away",
    "500": "A fault of the server's, with the id of an incident",
    "503": "Nobody can serve it now",
    "504": "The request took too long",
}


@cache
def document() -> bytes:
    """The description, as JSON."""
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Headrace",
                "version": __version__,
                "description": "The OpenAI-compatible edge of an inference mesh.",
            },
            "paths": _paths(),
            "components": {"schemas": _requests() | _answers()},
        }
    )


def _paths() -> dict[str, Any]:
    return {
        "/v1/chat/completions": _post("createChatCompletion", "ChatBody", "ChatCompletion"),
        "/v1/completions": _post("createCompletion", "CompletionBody", "Completion"),
        "/v1/embeddings": _post("createEmbedding", "EmbeddingBody", None),
        "/v1/models": _get("listModels", "ModelList"),
        "/v1/models/{id}": _get("retrieveModel", "Model", errors=("404",))
        | {
            "parameters": [
                {
                    "name": "id",
                    "in": "path",
                    "required": True,
                    "description": "The model's name; it may hold slashes.",
                    "schema": {"type": "string", "minLength": 1},
                }
            ]
        },
        "/health/live": _get("live", "Health"),
        "/health/ready": _get("ready", "Health", unready="503"),
        "/openapi.json": {
            "get": {
                "operationId": "describe",
                "responses": {"200": _json("This description", {"type": "object"})},
            }
        },
    }


def _post(operation: str, body: str, answer: str | None) -> dict[str, Any]:
    responses = {code: _json(text, _ref("ErrorBody")) for code, text in _ERRORS.items()}
    if answer is not None:
        done = _json("The answer", _ref(answer))
        # With `stream`: `data: ` and a chunk, again and again, then `data: [DONE]`. OpenAPI 3.1
        # has no words for that.
        done["content"]["text/event-stream"] = {}
        responses["200"] = done
    return {
        "post": {
            "operationId": operation,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(body)}},
            },
            "responses": responses,
        }
    }


def _get(
    operation: str, answer: str, *, errors: tuple[str, ...] = (), unready: str = ""
) -> dict[str, Any]:
    responses = {"200": _json("The answer", _ref(answer))}
    for code in (*errors, "405"):
        responses[code] = _json(_ERRORS[code], _ref("ErrorBody"))
    if unready:
        responses[unready] = _json("Not ready", _ref(answer))
    return {"get": {"operationId": operation, "responses": responses}}


def _json(text: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": content}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(name=name)}


def _requests() -> dict[str, Any]:
    """The bodies' types, and those in them."""
    kinds = [schema.ChatBody, schema.CompletionBody, schema.EmbeddingBody, schema.Tool]
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    for name, described in components.items():
        for field, given in described.get("properties", {}).items():
            # A model may well have a parameter of its tools called `n`.
            if name.endswith("Body"):
                _limit(given, _LIMITS.get(field, {}))
    chat = components["ChatBody"]["properties"]
    chat["tools"]["anyOf"][0]["items"] = _ref("Tool")
    _mark(chat, schema.CHAT_NOT_YET)
    _mark(components["CompletionBody"]["properties"], schema.COMPLETION_NOT_YET)
    _mark(components["Message"]["properties"], schema.MESSAGE_NOT_YET)
    _mark(components["ContentPart"]["properties"], schema.PART_NOT_YET)
    bias = next(part for part in chat["logit_bias"]["anyOf"] if part["type"] == "object")
    bias["additionalProperties"] |= {"minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS}
    components["Message"]["properties"]["role"]["enum"] = [
        *("system", "developer", "user", "assistant", "tool"),
    ]
    return components


def _limit(given: dict[str, Any], limits: Mapping[str, Any]) -> None:
    for part in given.get("anyOf", [given]):
        part |= {word: at for word, at in limits.items() if part.get("type") in _LIMITED[word]}


def _mark(properties: dict[str, Any], not_yet: Mapping[str, tuple[object, ...]]) -> None:
    """Of parameters that do nothing yet, the values that may be given."""
    for name, harmless in not_yet.items():
        properties[name] = {
            "description": "Not supported yet: any other value is refused.",
            "enum": [None, *harmless],
        }


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _maybe(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_ID = {"id": _TEXT, "created": _COUNT, "model": _TEXT}


def _answers() -> dict[str, Any]:
    error = _object(
        ("message", "type", "param", "code"),
        message=_TEXT,
        type=_TEXT,
        param=_maybe(_TEXT),
        code=_maybe(_TEXT),
    )
    usage = _object(
        ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"),
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(("cached_tokens",), cached_tokens=_COUNT),
    )
    model = _object(
        ("id", "object", "created", "owned_by"),
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        max_model_len=_COUNT,
    )
    return {
        "ErrorBody": _object(("error",), error=error),
        "Usage": usage,
        "Model": model,
        "ModelList": _object(
            ("object", "data"),
            object={"const": "list"},
            data={"type": "array", "items": _ref("Model")},
        ),
        "Health": _object(("status",), status=_TEXT, reason=_TEXT),
        "ChatCompletion": _answer("chat.completion", message=_ref("AnswerMessage")),
        "Completion": _answer("text_completion", text=_TEXT),
        "AnswerMessage": _object(
            ("role", "content", "refusal"),
            role={"const": "assistant"},
            content=_maybe(_TEXT),
            refusal=_maybe(_TEXT),
            reasoning_content=_TEXT,
            tool_calls={"type": "array", "items": _ref("ToolCall")},
        ),
    }


def _answer(kind: str, **said: Any) -> dict[str, Any]:
    choice = _object(
        ("index", "finish_reason", "logprobs", *said),
        index=_COUNT,
        finish_reason={"enum": ["stop", "length", "tool_calls"]},
        logprobs=_maybe({"type": "object"}),
        **said,
    )
    return _object(
        ("id", "object", "created", "model", "choices", "usage"),
        object={"const": kind},
        choices={"type": "array", "items": choice},
        usage=_ref("Usage"),
        service_tier=_TEXT,
        **_ID,
    )
