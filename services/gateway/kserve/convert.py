"""KServe's protos as our own small types, and back. What they mean is `options`' matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from headrace.errors import InvalidArgument
from headrace.kserve import inference_pb2 as pb
from services.gateway.kserve import tensors
from services.gateway.kserve.tensors import Element, Tensor

Value: TypeAlias = bool | int | float | str

#: Which field of InferTensorContents holds a datatype.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A ModelInferRequest. `outputs`: the names asked for; none means the usual ones."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Value]
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InferResponse:
    """A ModelInferResponse."""

    model: str
    version: str
    id: str
    outputs: Sequence[Tensor] = ()
    parameters: Mapping[str, bool] = field(default_factory=dict)


def request_from_proto(proto: pb.ModelInferRequest) -> InferRequest:
    """Raises InvalidArgument naming the tensor or parameter at fault."""
    raw = proto.raw_input_contents
    if raw and len(raw) != len(proto.inputs):
        raise InvalidArgument(
            f"raw_input_contents must have one entry for each of the {len(proto.inputs)} inputs, "
            f"not {len(raw)}",
            field="raw_input_contents",
        )
    inputs: dict[str, Tensor] = {}
    for index, given in enumerate(proto.inputs):
        if given.name in inputs:
            raise InvalidArgument(f"input {given.name!r} is given twice", field=given.name)
        if given.parameters:
            raise InvalidArgument(
                f"input {given.name!r}: parameter {min(given.parameters)!r} is not supported "
                "(shared memory is not: send the contents)",
                field=given.name,
            )
        inputs[given.name] = _input(given, raw[index] if raw else None)
    return InferRequest(
        model=proto.model_name,
        version=proto.model_version,
        id=proto.id,
        parameters={name: _value(name, proto.parameters[name]) for name in proto.parameters},
        inputs=inputs,
        outputs=tuple(output.name for output in proto.outputs),
    )


def response_to_proto(response: InferResponse) -> pb.ModelInferResponse:
    """Contents travel raw, as Triton's do."""
    return pb.ModelInferResponse(
        model_name=response.model,
        model_version=response.version,
        id=response.id,
        parameters={
            name: pb.InferParameter(bool_param=value) for name, value in response.parameters.items()
        },
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
            )
            for tensor in response.outputs
        ],
        raw_output_contents=[tensors.pack(tensor) for tensor in response.outputs],
    )


def _input(given: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, datatype = given.name, given.datatype
    tensors.check_datatype(name, datatype)
    elements: tuple[Element, ...]
    if raw is None:
        if datatype not in _CONTENTS:
            raise InvalidArgument(
                f"input {name!r}: {datatype} has no field in contents: use raw_input_contents",
                field=name,
            )
        elements = tuple(getattr(given.contents, _CONTENTS[datatype]))
    elif given.HasField("contents"):
        raise InvalidArgument(
            f"input {name!r}: give contents or raw_input_contents, not both", field=name
        )
    else:
        elements = tensors.unpack(name, datatype, raw)
    tensors.check_count(name, given.shape, len(elements))
    return Tensor(name, datatype, tuple(given.shape), elements)


def _value(name: str, proto: pb.InferParameter) -> Value:
    kind = proto.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidArgument(f"parameter {name!r} has no value", field=name)
    value: Value = getattr(proto, kind)
    return value
