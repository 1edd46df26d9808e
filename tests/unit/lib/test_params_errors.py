"""Sampling parameters are refused by name; every error has a status."""

from __future__ import annotations

import math

import grpc
import pytest

from headrace import errors
from headrace.errors import HeadraceError, InvalidArgument
from headrace.params import SamplingParams
from headrace.rpc.errors import from_exception, from_proto, to_proto


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("top_k", -1),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 1 << 64),
    ],
)
def test_out_of_range_names_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{field: value}).validate()
    assert caught.value.field == field
    assert f"{value:g}" in caught.value.message or str(value) in caught.value.message


def test_the_edges_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, min_p=1, top_k=0, max_tokens=1, seed=0).validate()
    SamplingParams(temperature=2, top_p=1e-6, min_p=0, seed=(1 << 64) - 1).validate()


def _kinds(kind: type[HeadraceError]) -> set[type[HeadraceError]]:
    return {kind}.union(*(_kinds(sub) for sub in kind.__subclasses__()))


def test_the_status_table_is_total_and_its_codes_exist() -> None:
    kinds = _kinds(HeadraceError) - {HeadraceError}
    assert set(errors.STATUS) == kinds
    codes = [s.grpc_code for s in errors.STATUS.values()]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= {c.value[0] for c in grpc.StatusCode}


@pytest.mark.parametrize("kind", [k for k in errors.STATUS if k is not errors.Internal])
def test_errors_cross_the_wire(kind: type[HeadraceError]) -> None:
    error = kind("why", field="prompt", retry_after_ms=7)
    back = from_proto(to_proto(error))
    assert type(back) is kind
    assert (back.message, back.field, back.retry_after_ms) == ("why", "prompt", 7)


def test_internal_faults_show_only_an_incident() -> None:
    ours = from_exception(RuntimeError("secret detail"))
    assert isinstance(ours, errors.Internal)
    assert "secret" not in ours.message
    assert ours.incident in ours.message
    back = from_proto(to_proto(ours))
    assert isinstance(back, errors.Internal)
    assert back.message == ours.message
