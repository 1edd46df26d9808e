"""Requests made of the description that the gateway serves: no 5xx, no crash, nothing left behind.

schemathesis makes them, sound ones and damaged ones, and checks every answer against
the description.
"""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.mesh import Mesh

MODEL = "smollm2-135m"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
MAY_BE_REFUSED = {
    *("bad_words", "frequency_penalty", "logit_bias", "min_tokens", "presence_penalty"),
    *("prompt_logprobs", "repetition_penalty", "response_format", "tools", "tool_choice"),
    *("stream_options", "top_logprobs", "continue_final_message", "add_special_tokens", "best_of"),
}
OPERATIONS = [
    *(("POST", f"/v1/{name}", POSITIVE) for name in ("chat/completions", "completions")),
    *(("POST", f"/v1/{name}", NEGATIVE) for name in ("chat/completions", "completions")),
    ("POST", "/v1/embeddings", NEGATIVE),
    ("POST", "/v1/embeddings", POSITIVE),
    # Every text may be a model's name.
    ("GET", "/v1/models/{id}", POSITIVE),
]


@pytest.fixture(scope="module")
def described(sim_mesh: Mesh) -> Any:
    with urllib.request.urlopen(f"{sim_mesh.url}/openapi.json", timeout=10) as response:
        return schemathesis.openapi.from_dict(json.load(response))


def servable(body: dict[str, Any], *, is_sound: bool) -> dict[str, Any]:
    """The body, of our model and of few tokens; a sound one without what a model's template or
    engine may refuse, every other time."""
    body = {**body, "model": MODEL}
    limits = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    if any(limit is None or (isinstance(limit, int) and limit > 8) for limit in limits):
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = 3
    if is_sound and len(body) % 2:
        body = {name: body[name] for name in body if name not in MAY_BE_REFUSED}
        if "messages" in body:
            body["messages"] = [{"role": "user", "content": "hi"}]
    return body


def fuzz(mesh: Mesh, described: Any, method: str, path: str, mode: Any, count: int) -> None:
    operation = described[path][method]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = servable(case.body, is_sound=mode is POSITIVE)
        response = case.call(base_url=mesh.url, timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    run()
    if mode is POSITIVE and path.endswith("completions"):
        assert statuses[200] > count // 20, statuses


def watched(mesh: Mesh, work: Callable[[], None]) -> None:
    """Do `work`; the same processes still run, idle and with no more open files."""
    before = {process["name"]: process["pid"] for process in mesh.status()["processes"]}
    gateway = psutil.Process(before["gateway"])
    num_fds = gateway.num_fds()
    work()
    assert {p["name"]: p["pid"] for p in mesh.status()["processes"]} == before
    mesh.wait_idle()
    assert gateway.num_fds() <= num_fds + 16


@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_any_request_that_the_description_allows_or_not(
    sim_mesh: Mesh, described: Any, method: str, path: str, mode: Any
) -> None:
    watched(sim_mesh, lambda: fuzz(sim_mesh, described, method, path, mode, 25))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "path", "mode"), OPERATIONS)
def test_many_of_them(sim_mesh: Mesh, described: Any, method: str, path: str, mode: Any) -> None:
    watched(sim_mesh, lambda: fuzz(sim_mesh, described, method, path, mode, 1000))
