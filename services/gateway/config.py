"""What a gateway can be told."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import option


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """One gateway: its two edges, its peers, its limits. Times in seconds, lengths in bytes."""

    tokenizer: str = option(help="address of the tokenizer service", metavar="HOST:PORT")
    router: tuple[str, ...] = option(
        help="address of the router service, or of several (repeat, or separate by commas)",
        metavar="HOST:PORT",
    )
    http: str = option(
        "127.0.0.1:8080", help="where to serve the OpenAI-compatible API", metavar="HOST:PORT"
    )
    grpc: str = option("127.0.0.1:50051", help="where to serve gRPC", metavar="HOST:PORT")
    gateway_id: str = option("", help="this gateway's name; drawn at random if not given")
    request_timeout_s: float = option(600.0, help="longest that a request may take")
    tokenizer_timeout_s: float = option(
        10.0, help="longest that a request waits for the tokenizer, outages included"
    )
    route_timeout_s: float = option(
        1.0, help="longest wait for the router before choosing a worker without it"
    )
    worker_wait_s: float = option(
        30.0, help="longest that a request which lost its worker waits for another"
    )
    worker_connect_timeout_s: float = option(2.0, help="longest wait for a worker to accept")
    resume_window_s: float = option(
        1.0, help="how long to go back to a worker whose connection broke before moving away"
    )
    heartbeat_timeout_s: float = option(3.0, help="silence after which a worker is dead")
    worker_idle_s: float = option(60.0, help="close a worker's stream after this long unused")
    max_requests: int = option(4096, help="requests at once; more are refused")
    max_attempts: int = option(3, help="workers that one sequence is tried on")
    max_body_len: int = option(4 << 20, help="longest HTTP request body")
    max_client_buffer_len: int = option(
        1 << 20, help="output that waits for a client which does not read; more ends its request"
    )
    drain_timeout_s: float = option(30.0, help="how long running requests may go on at SIGTERM")
