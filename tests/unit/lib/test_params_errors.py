"""Sampling parameters are refused by name; every error has a status."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import grpc
import pytest

from headrace import errors
from headrace.errors import HeadraceError, InvalidArgument
from headrace.params import SamplingParams
from headrace.rpc.convert import sampling_from_proto, sampling_to_proto
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
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.inf),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
    ],
)
def test_out_of_range_names_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**{field: value}).validate()
    assert caught.value.field == field
    assert f"{value:g}" in caught.value.message or str(value) in caught.value.message


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", r"max_tokens \(4\), not 5"),
        ({"stop_token_ids": (1,) * 257}, "stop_token_ids", "at most 256 ids, not 257"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias", "not 1 twice"),
        ({"logit_bias": ((1, 100.5),)}, "logit_bias[1]", "not 100.5"),
        (
            {"logit_bias": tuple((token, 1.0) for token in range(1025))},
            "logit_bias", "at most 1024 entries, not 1025",
        ),
        ({"stop_token_sequences": ((1,),) * 17}, "stop_token_sequences", "at most 16 .* not 17"),
        ({"stop_token_sequences": ((1,), ())}, "stop_token_sequences[1]", "1 to 32 .* not 0"),
        ({"bad_token_sequences": ((1,) * 33,)}, "bad_token_sequences[0]", "1 to 32 .* not 33"),
        ({"bad_token_sequences": ((1,),) * 257}, "bad_token_sequences", "at most 256 .* not 257"),
    ],
)  # fmt: skip
def test_lists_beyond_their_limits_are_refused(
    values: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said) as caught:
        SamplingParams(**values).validate()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"stop_token_ids": (1, 100)}, "stop_token_ids"),
        ({"logit_bias": ((100, 1.0),)}, "logit_bias"),
        ({"stop_token_sequences": ((1,), (2, 100))}, "stop_token_sequences[1]"),
        ({"bad_token_sequences": ((100,),)}, "bad_token_sequences[0]"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(values: dict[str, Any], field: str) -> None:
    params = SamplingParams(**values)
    params.check_vocabulary(101)
    with pytest.raises(InvalidArgument, match="100") as caught:
        params.check_vocabulary(100)
    assert caught.value.field == field


def test_parameters_cross_the_wire() -> None:
    plain = SamplingParams(seed=1, max_tokens=5)
    assert sampling_from_proto(sampling_to_proto(plain)) == plain
    full = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=7, min_p=0.05, seed=9, max_tokens=50, ignore_eos=True,
        stop_token_ids=(4, 2), repetition_penalty=1.3, presence_penalty=-0.4,
        frequency_penalty=0.2, logit_bias=((3, -99.5), (70, 0.1)), min_tokens=6,
        stop_token_sequences=((1, 2), (3,)), bad_token_sequences=((5,), (6, 7)), logprobs=0,
        prompt_logprobs=20,
    )  # fmt: skip
    assert not [f.name for f in fields(full) if getattr(full, f.name) == getattr(plain, f.name)]
    assert sampling_from_proto(sampling_to_proto(full)) == full


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
