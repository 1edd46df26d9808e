"""The mesh on one machine: which processes it is, started, kept running, and stopped.

`prepare` checks what was asked, `processes` says which processes that means, `serve`
runs them under a `Supervisor` until a signal; `StateDir` is what others can read of it.
"""

from headrace.supervisor.app import prepare, processes, serve
from headrace.supervisor.state import MeshState, StateDir, default_state_dir, is_running

__all__ = [
    "MeshState",
    "StateDir",
    "default_state_dir",
    "is_running",
    "prepare",
    "processes",
    "serve",
]
