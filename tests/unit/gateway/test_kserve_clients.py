"""Others' clients against a real gateway, and their idea of the protocol beside ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from headrace.kserve import inference_pb2 as pb
from tests import kserve_clients

TRITON = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
said = {"live": client.is_server_live(), "ready": client.is_server_ready()}
said["model"] = client.is_model_ready("bytes")
said["other"] = client.is_model_ready("other")
said["name"] = client.get_server_metadata().name
said["inputs"] = [t.name for t in client.get_model_metadata("bytes").inputs]
def inputs(stream):
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello"], dtype=object))
    flag = triton.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    options = triton.InferInput("sampling_parameters", [1], "BYTES")
    options.set_data_from_numpy(np.array([b'{"max_tokens": "30"}'], dtype=object))
    return [text, flag, options]
result = client.infer("bytes", inputs(False), request_id="one",
                      outputs=[triton.InferRequestedOutput("text_output")])
said["whole"] = result.as_numpy("text_output")[0].decode()
said["id"] = result.get_response().id
try:
    client.infer("bytes", inputs(False)[1:])
except triton.InferenceServerException as error:
    said["refused"] = str(error)
came = queue.Queue()
client.start_stream(lambda result, error: came.put((result, error)))
client.async_stream_infer("bytes", inputs(True), request_id="two",
                          enable_empty_final_response=True)
said["parts"] = []
while True:
    result, error = came.get(timeout=30)
    if error is not None:
        raise error
    response = result.get_response()
    assert response.id == "two"
    if response.outputs:
        said["parts"].append(result.as_numpy("text_output")[0].decode())
    if response.parameters["triton_final_response"].bool_param:
        break
client.async_stream_infer("bytes", inputs(True)[1:], request_id="three")
said["stream error"] = str(came.get(timeout=30)[1])
client.stop_stream()
print(json.dumps(said))
"""

KSERVE = """
import asyncio, json, sys
from kserve import InferenceGRPCClient, InferInput, InferRequest
async def main():
    client = InferenceGRPCClient(url=sys.argv[1])
    said = {"live": await client.is_server_live(), "ready": await client.is_server_ready()}
    said["model"] = await client.is_model_ready("bytes")
    text = InferInput(name="text_input", shape=[1], datatype="BYTES", data=["hello"])
    request = InferRequest(model_name="bytes", infer_inputs=[text], request_id="one",
                           parameters={"max_tokens": 30})
    response = await client.infer(request)
    said["id"] = response.id
    said["whole"] = response.outputs[0].as_numpy().tolist()
    await client.close()
    print(json.dumps(said, default=lambda v: v.decode()))
asyncio.run(main())
"""

DESCRIPTOR = {
    "tritonclient": "from tritonclient.grpc import service_pb2 as p\n",
    "kserve": "from kserve.protocol.grpc import grpc_predict_v2_pb2 as p\n",
}
DUMP = "import sys; sys.stdout.buffer.write(p.DESCRIPTOR.serialized_pb)"
LETTERS = "".join(chr(97 + i % 26) for i in range(30))


async def run(name: str, script: str, *arguments: str) -> bytes:
    """What a client prints."""
    found = await asyncio.to_thread(kserve_clients.command, name, script, *arguments)
    if found is None:
        pytest.skip(f"{name} is not here: python tests/kserve_clients.py {name} fetches it")
    command, environment = found
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out


async def test_tritonclient(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    said = json.loads(await run("tritonclient", TRITON, f"127.0.0.1:{mesh.gateway.grpc_port}"))
    assert (said["live"], said["ready"], said["model"], said["other"]) == (True, True, True, False)
    assert said["name"] == "headrace"
    assert "text_input" in said["inputs"]
    assert (said["whole"], said["id"]) == (LETTERS, "one")
    assert "".join(said["parts"]) == LETTERS
    assert len(said["parts"]) > 3
    assert "StatusCode.INVALID_ARGUMENT" in said["refused"]
    assert "text_input" in said["refused"]
    assert "text_input" in said["stream error"]


async def test_kserve(mesh: Any) -> None:
    await mesh.start(num_workers=1)
    said = json.loads(await run("kserve", KSERVE, f"127.0.0.1:{mesh.gateway.grpc_port}"))
    assert (said["live"], said["ready"], said["model"]) == (True, True, True)
    assert (said["whole"], said["id"]) == ([LETTERS], "one")


@pytest.mark.parametrize("name", DESCRIPTOR)
async def test_fields_are_those_of_the_published_protocol(name: str) -> None:
    """By name: number, type, whether repeated; every message and RPC of ours."""
    theirs = descriptor_pb2.FileDescriptorProto.FromString(await run(name, DESCRIPTOR[name] + DUMP))
    ours = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert ours.package == theirs.package
    their_messages, our_messages = dict(_messages(theirs)), dict(_messages(ours))
    only_tritons = {"ModelStreamInferResponse"}
    assert set(our_messages) - set(their_messages) <= (only_tritons if name == "kserve" else set())
    for message, fields in our_messages.items():
        published = their_messages.get(message, fields)
        known = {field: value for field, value in fields.items() if field in published}
        assert known.items() <= published.items(), message
        only_ours = fields.keys() - known.keys()
        # Triton's, which KServe's file lacks.
        assert not only_ours or (name, message) == ("kserve", "InferParameter"), only_ours
    for service in ours.service:
        (other,) = (s for s in theirs.service if s.name == service.name)
        methods = {m.name: _method(m) for m in other.method}
        for method in service.method:
            if name == "kserve" and method.name == "ModelStreamInfer":
                continue
            assert methods[method.name] == _method(method)


def _messages(file: Any, prefix: str = "") -> Any:
    for message in getattr(file, "message_type", None) or getattr(file, "nested_type", []):
        name = prefix + message.name
        yield name, {f.name: (f.number, f.type, f.label, f.type_name) for f in message.field}
        yield from _messages(message, f"{name}.")


def _method(method: Any) -> tuple[Any, ...]:
    return (
        method.input_type,
        method.output_type,
        method.client_streaming,
        method.server_streaming,
    )
