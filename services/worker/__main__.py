"""`python -m services.worker`."""

from __future__ import annotations

import sys

from headrace import service
from services.worker import app
from services.worker.config import WorkerConfig


def main() -> int:
    """Read the configuration and serve. Returns the exit status."""
    config = service.read_config("worker", WorkerConfig, "The worker: one engine behind gRPC.")
    instance = config.worker_id or config.advertise or config.listen
    return service.run("worker", instance, lambda stop: app.run(config, stop))


if __name__ == "__main__":
    sys.exit(main())
