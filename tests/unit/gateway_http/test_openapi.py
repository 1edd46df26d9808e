"""The description that the edge serves of itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openapi_spec_validator import validate

from services.gateway.http.app import create_app
from services.gateway.http.openapi import document
from services.gateway.http.schema import ChatBody, CompletionBody, EmbeddingBody

DESCRIBED: dict[str, Any] = json.loads(document())


def test_it_is_valid() -> None:
    validate(DESCRIBED)


def test_every_route_is_in_it() -> None:
    pipeline: Any = None
    app = create_app(pipeline, max_body_len=1)
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {
        (method, path)
        for path, item in DESCRIBED["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert {(m, p.replace("{id:.+}", "{id}")) for m, p in routes} == described


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, EmbeddingBody])
def test_every_parameter_is_in_it_and_no_other_is_allowed(body: Any) -> None:
    described = DESCRIBED["components"]["schemas"][body.__name__]
    assert set(described["properties"]) == set(body.__struct_fields__)
    assert described["additionalProperties"] is False


def test_limits_are_in_it() -> None:
    chat = DESCRIBED["components"]["schemas"]["ChatBody"]["properties"]
    assert chat["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 16}
    assert chat["tools"]["anyOf"][0]["items"] == {"$ref": "#/components/schemas/Tool"}
    assert chat["store"]["enum"] == [None, False]


async def test_it_is_served(edge: Any, connect: Any) -> None:
    connection = await connect(edge)
    connection.send(b"GET /openapi.json HTTP/1.1\r\nHost: edge\r\n\r\n")
    answer = await connection.response()
    assert answer.status == 200
    assert answer.json() == DESCRIBED
