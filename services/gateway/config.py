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
    tool_parser: tuple[str, ...] = option(
        (),
        help="how models write tool calls, if their chat templates don't tell: hermes, "
        "llama3_json, mistral or mistral_args, for all models or as MODEL=NAME (repeat, or "
        "separate by commas)",
        metavar="NAME",
    )
    processes: int = option(
        1, help="processes that share both ports, each with a loop and an identity of its own"
    )
    reuse_port: bool = option(
        False, help="let other gateways of this machine and user share both ports"
    )
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
    max_connections: int = option(
        20_000,
        help="connections at once on each edge; fewer where the limit of open files is lower",
    )
    connection_max_age_s: float = option(
        900.0,
        help="age, give or take a tenth, from which a connection is closed after what runs on it, "
        "so that clients spread over gateways as these come and go; 0: never",
    )
    connection_grace_s: float = option(
        600.0, help="longest that what runs may keep a gRPC connection past its age"
    )
    http_idle_s: float = option(
        75.0, help="close an HTTP connection this long after its last request or first byte"
    )
    http_body_timeout_s: float = option(30.0, help="longest that a request's body may take")
    client_read_timeout_s: float = option(
        60.0, help="cut an HTTP client that has read nothing for so long while output waits"
    )
    drain_delay_s: float = option(
        0.0, help="at SIGTERM, go on serving for so long, not ready: for load balancers to notice"
    )
    drain_timeout_s: float = option(30.0, help="how long running requests may go on at SIGTERM")
