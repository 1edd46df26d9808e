"""Every RPC in the protos is implemented, and every stream's messages fit its hop."""

from __future__ import annotations

from importlib import import_module

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from headrace.v1 import inference_pb2, router_pb2, tokenizer_pb2, worker_pb2

SERVICERS = {
    "InferenceService": "services.gateway.servicer",
    "TokenizerService": "services.tokenizer.servicer",
    "RouterService": "services.router.servicer",
    "WorkerService": "services.worker.servicer",
}
SERVICES: list[ServiceDescriptor] = [
    service
    for module in (inference_pb2, router_pb2, tokenizer_pb2, worker_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]


def test_every_service_has_a_servicer() -> None:
    assert {s.name for s in SERVICES} == set(SERVICERS)


@pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)
def test_every_rpc_is_implemented(service: ServiceDescriptor) -> None:
    module = import_module(SERVICERS[service.name])
    generated = import_module(f"headrace.v1.{service.file.name.rpartition('/')[2][:-6]}_pb2_grpc")
    base = getattr(generated, f"{service.name}Servicer")
    servicers = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    ]
    assert len(servicers) == 1
    for method in service.methods:
        assert getattr(servicers[0], method.name) is not getattr(base, method.name), (
            f"{service.name}.{method.name} is not implemented"
        )
