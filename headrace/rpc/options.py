"""Channel and server settings for inner hops, with why each stands.

Measured with grpcio 1.85: `keepalive_timeout_ms` does not time out pings, the
internal `http2.ping_timeout_ms` does (a stopped peer is noticed after 2.5–3 s;
a test holds that); without `min_ping_interval_without_data_ms` below the
client's ping time a server answers idle pings with GOAWAY; `so_reuseport` lets
two servers share a port silently; `bdp_probe=0` with `lookahead_bytes` keeps
what a slow reader makes us buffer at 256 KiB instead of 4 MiB.
"""

from __future__ import annotations

from typing import TypeAlias

Options: TypeAlias = list[tuple[str, int | str]]

#: Longest message either side accepts, in bytes.
MAX_MESSAGE_LEN = 4 << 20
#: Frames on shared streams stay below this, so that none blocks the others long.
FRAME_LEN = 64 << 10
#: Longest message that may arrive in chunks, in bytes.
MAX_CHUNKED_LEN = 64 << 20

_COMMON: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_LEN),
    ("grpc.max_send_message_length", MAX_MESSAGE_LEN),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 262144),
]

CHANNEL: Options = [
    *_COMMON,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    # Inner hops are direct: no proxy from the environment.
    ("grpc.enable_http_proxy", 0),
]

SERVER: Options = [
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.so_reuseport", 0),
]
