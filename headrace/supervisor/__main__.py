"""The supervisor of a detached mesh: `python -m headrace.supervisor STATE_DIR LOCK_FD`.

Started by `headrace up --detach`, with the prepared MeshConfig as JSON on stdin and
the state's lock inherited. Its output goes to STATE/logs/supervisor.log; what
came of it stands in mesh.json.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import msgspec

from headrace.errors import StartupError
from headrace.service import setup_logs
from headrace.supervisor.app import processes, serve
from headrace.supervisor.plan import MeshConfig
from headrace.supervisor.state import StateDir

log = logging.getLogger("headrace.supervisor")


def main() -> int:
    """The exit status: 0 after a stop that was asked for, 1 if the mesh could not start."""
    root, lock = sys.argv[1:]
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=MeshConfig)
    setup_logs("supervisor")
    with os.fdopen(int(lock), "ab"):
        os.set_inheritable(int(lock), False)
        try:
            state = StateDir(Path(root))
            asyncio.run(serve(config, processes(config, state), state, log.info))
        except StartupError as error:
            log.error("%s", error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
