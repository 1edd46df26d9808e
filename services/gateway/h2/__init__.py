"""A gRPC server over asyncio: HTTP/2 spoken by ourselves, so that a token costs one write.

`server` is the door, `connection` one client's HTTP/2 connection, `headers` what opens
calls on it, `call` one RPC, `wire` the bytes. Servicers are those that grpc's
generated code registers; what they need of a `ServicerContext` is a `ServerCall`.
It knows no service.
"""
