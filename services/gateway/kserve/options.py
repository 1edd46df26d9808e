"""A KServe request as Triton's language-model backends read it: tensors and parameters to
a `GenerationRequest`.

An option is found, in this order, as an input tensor of one element (TensorRT-LLM's
way), as a parameter of the request (the generate extension's way), or as a key of the
JSON object `sampling_parameters` (vLLM's way), under either backend's name. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import InvalidArgument, NotFound
from headrace.params import SamplingParams
from services.gateway.generation import GenerationRequest
from services.gateway.kserve.tensors import BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.gateway.kserve.convert import InferRequest
    from services.gateway.kserve.tensors import Tensor

#: The only version of a model.
VERSION = "1"
#: What is generated at most when the client does not say: vLLM's default.
DEFAULT_MAX_TOKENS = 16

TEXT_INPUT, INPUT_IDS, TEXT_OUTPUT = "text_input", "input_ids", "text_output"
SAMPLING_PARAMETERS = "sampling_parameters"
#: Outputs beside the text -> the option that asks for each, where it is not asked for by name.
EXTRA_OUTPUTS = {
    "finish_reason": "return_finish_reason",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
}

_UINT32 = (1 << 32) - 1
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What a client wants, and how it wants the answer. `outputs`: what beside the text."""

    generation: GenerationRequest
    id: str
    stream: bool
    #: The prompt goes before the text.
    echo: bool
    outputs: tuple[str, ...]
    #: A response of its own says that the last has come.
    empty_final_response: bool


def parse(request: InferRequest, request_id: str, time_left_s: float | None) -> TextRequest:
    """Raises InvalidArgument naming the tensor or parameter, NotFound for a version."""
    check_version(request.model, request.version)
    given = _gather(request)
    take = given.pop
    stops = (*take("stop", ()), *take("stop_words", ()))
    sampling = SamplingParams(
        temperature=take("temperature", 1.0),
        top_p=take("top_p", 1.0),
        top_k=max(0, take("top_k", 0)),
        min_p=take("min_p", 0.0),
        seed=take("seed", None),
        max_tokens=take("max_tokens", DEFAULT_MAX_TOKENS),
        min_tokens=take("min_tokens", 0),
        stop_token_ids=tuple(take("stop_token_ids", ())),
        ignore_eos=take("ignore_eos", False),
        repetition_penalty=take("repetition_penalty", 1.0),
        presence_penalty=take("presence_penalty", 0.0),
        frequency_penalty=take("frequency_penalty", 0.0),
    )
    prompt, token_ids = _prompt(request.inputs)
    generation = GenerationRequest(
        request_id=request_id,
        model=request.model,
        prompt=prompt,
        token_ids=token_ids,
        sampling=sampling,
        n=take("n", 1),
        stop=tuple(stops),
        timeout_s=_timeout(take("timeout", 0), time_left_s),
    )
    stream, echo = take("stream", False), not take("exclude_input_in_output", True)
    if echo and (stream or prompt is None):
        raise InvalidArgument(
            "exclude_input_in_output can be false only for a text_input that is not streamed",
            field="exclude_input_in_output",
        )
    if stream and generation.n > 1:
        raise InvalidArgument("n must be 1 in a stream", field="n")
    return TextRequest(
        generation=generation,
        id=request.id,
        stream=stream,
        echo=echo,
        outputs=_outputs(request.outputs, given),
        empty_final_response=take("triton_enable_empty_final_response", False),
    )


def check_version(model: str, version: str) -> None:
    """Raises NotFound for a version that is not there."""
    if version not in ("", VERSION):
        raise NotFound(
            f"model {model!r} has version {VERSION} alone, not {version[:32]!r}", field="version"
        )


def _prompt(inputs: Mapping[str, Tensor]) -> tuple[str | None, tuple[int, ...] | None]:
    text, ids = inputs.get(TEXT_INPUT), inputs.get(INPUT_IDS)
    if (text is None) == (ids is None):
        raise InvalidArgument(
            f"one of the inputs {TEXT_INPUT} (BYTES) and {INPUT_IDS} (INT32 or INT64) must be "
            "given",
            field=TEXT_INPUT,
        )
    if text is not None:
        return _one_text(text), None
    assert ids is not None
    if ids.datatype not in ("INT32", "INT64", "UINT32"):
        raise InvalidArgument(
            f"input {INPUT_IDS!r} must be INT32, INT64 or UINT32, not {ids.datatype}",
            field=INPUT_IDS,
        )
    if len(ids.shape) > 1 and ids.shape[0] != 1:
        raise InvalidArgument(
            f"input {INPUT_IDS!r} must hold one prompt, not {ids.shape[0]}: send a request for "
            "each",
            field=INPUT_IDS,
        )
    values = [value for value in ids.elements if isinstance(value, int)]
    return None, tuple(_integer(INPUT_IDS, value, 0, _UINT32) for value in values)


def _one_text(tensor: Tensor) -> str:
    if tensor.datatype != BYTES or len(tensor.elements) != 1:
        raise InvalidArgument(
            f"input {tensor.name!r} must hold one BYTES element, not {len(tensor.elements)} of "
            f"{tensor.datatype}: send a request for each",
            field=tensor.name,
        )
    return _text(tensor.name, tensor.elements[0])


def _outputs(asked: tuple[str, ...], flags: Mapping[str, Any]) -> tuple[str, ...]:
    for name in asked:
        if name != TEXT_OUTPUT and name not in EXTRA_OUTPUTS:
            known = ", ".join((TEXT_OUTPUT, *EXTRA_OUTPUTS))
            raise InvalidArgument(f"output {name[:64]!r} is none of {known}", field=name)
    return tuple(
        name for name, flag in EXTRA_OUTPUTS.items() if name in asked or flags.get(flag, False)
    )


def _timeout(timeout_us: int, time_left_s: float | None) -> float | None:
    if not timeout_us:
        return time_left_s
    return min(timeout_us / 1e6, time_left_s or timeout_us / 1e6)


# Options: their names, and what a value may be.


def _gather(request: InferRequest) -> dict[str, Any]:
    """All options of a request by our names."""
    found: dict[str, Any] = {}
    for name, value in _sampling_parameters(request).items():
        _take(found, name, value, f"{SAMPLING_PARAMETERS}: {name}")
    for name, value in request.parameters.items():
        if name != SAMPLING_PARAMETERS:
            _take(found, name, value, f"parameter {name!r}")
    for name, tensor in request.inputs.items():
        if name not in (TEXT_INPUT, INPUT_IDS, SAMPLING_PARAMETERS):
            _take(found, name, _elements(tensor), f"input {name!r}")
    return found


def _take(found: dict[str, Any], name: str, value: Any, what: str) -> None:
    option = _OPTIONS.get(_ALIASES.get(name, name))
    if option is None:
        raise InvalidArgument(f"{what[:80]} is not known; known are: {_KNOWN}", field=name[:64])
    found[_ALIASES.get(name, name)] = option(name, value)


def _elements(tensor: Tensor) -> Any:
    many = _ALIASES.get(tensor.name, tensor.name) in _LISTS
    values = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in tensor.elements]
    if many:
        return values
    if len(values) != 1:
        raise InvalidArgument(
            f"input {tensor.name!r} must hold one element, not {len(values)}", field=tensor.name
        )
    return values[0]


def _sampling_parameters(request: InferRequest) -> dict[str, Any]:
    text: Any = request.parameters.get(SAMPLING_PARAMETERS, "")
    if (tensor := request.inputs.get(SAMPLING_PARAMETERS)) is not None:
        text = _one_text(tensor)
    if not text:
        return {}
    try:
        values = msgspec.json.decode(text if isinstance(text, str) else "")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(
            f"{SAMPLING_PARAMETERS} is not valid JSON: {error}", field=SAMPLING_PARAMETERS
        ) from error
    if not isinstance(values, dict):
        raise InvalidArgument(
            f"{SAMPLING_PARAMETERS} must be a JSON object", field=SAMPLING_PARAMETERS
        )
    return values


def _wrong(name: str, expected: str, value: object) -> InvalidArgument:
    return InvalidArgument(f"{name} must be {expected}, not {str(value)[:64]!r}", field=name)


def _text(name: str, value: object) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidArgument(
                f"{name} is not UTF-8: {error.reason} (byte {error.start})", field=name
            ) from error
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def _integer(name: str, value: object, low: int, high: int) -> int:
    # vLLM's own client sends the values of sampling_parameters as strings.
    if isinstance(value, str):
        try:
            value = int(value[:32])
        except ValueError:
            raise _wrong(name, "an integer", value) from None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "an integer", value)
    if not low <= value <= high:
        raise _wrong(name, f"in [{low}, {high}]", value)
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _wrong(name, "a number", value) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "a number", value)
    # The decimal that a client meant: 0.7 comes as FP32's 0.699999988.
    return float(f"{value:.7g}")


def _flag(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _wrong(name, "a boolean", value)
    return value


def _texts(name: str, value: object) -> list[str]:
    """A string, a list of them, or one as JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = _json_list(name, value)
    values = value if isinstance(value, list) else [value]
    return [_text(name, item) for item in values]


def _integers(name: str, value: object) -> list[int]:
    if isinstance(value, str):
        value = _json_list(name, value)
    values = value if isinstance(value, list) else [value]
    return [_integer(name, item, 0, _UINT32) for item in values]


def _json_list(name: str, text: str) -> list[Any]:
    try:
        return msgspec.json.decode(text, type=list[Any])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise _wrong(name, "a JSON array", text) from error


def _ranged(low: int, high: int) -> Callable[[str, object], int]:
    return lambda name, value: _integer(name, value, low, high)


#: TensorRT-LLM's names, where they are not vLLM's.
_ALIASES = {
    "random_seed": "seed",
    "min_length": "min_tokens",
    "max_new_tokens": "max_tokens",
    "end_id": "stop_token_ids",
}
_LISTS = frozenset({"stop", "stop_words", "stop_token_ids"})
_OPTIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_tokens": _ranged(1, _UINT32),
    "min_tokens": _ranged(0, _UINT32),
    "temperature": _number,
    "top_p": _number,
    "top_k": _ranged(-1, _UINT32),
    "min_p": _number,
    "seed": _ranged(0, _UINT64),
    "n": _ranged(1, _UINT32),
    "stop": _texts,
    "stop_words": _texts,
    "stop_token_ids": _integers,
    "ignore_eos": _flag,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "stream": _flag,
    "exclude_input_in_output": _flag,
    "timeout": _ranged(0, _UINT64),
    "triton_enable_empty_final_response": _flag,
    **dict.fromkeys(EXTRA_OUTPUTS.values(), _flag),
}
_KNOWN = ", ".join((SAMPLING_PARAMETERS, *_OPTIONS, *_ALIASES))
