"""The gateway's two peers before a worker: the tokenizer and the router.

Only here, in `worker_stream` and in `servicer` does the gateway speak protos.
"""

from services.gateway.peers.router import RouteQuery, RouterPeer
from services.gateway.peers.tokenizer import Encoded, TokenizerPeer

__all__ = ["Encoded", "RouteQuery", "RouterPeer", "TokenizerPeer"]
