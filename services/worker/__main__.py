"""`python -m services.worker`: one engine behind gRPC."""

from __future__ import annotations

import sys

from headrace import config, service
from headrace.errors import StartupError
from services.worker import app
from services.worker.config import WorkerConfig


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    try:
        chosen = config.load(
            WorkerConfig, service="worker", argv=argv, description="One engine behind gRPC."
        )
    except StartupError as error:
        print(f"worker: {error}", file=sys.stderr)
        return service.EXIT_CONFIG
    instance = chosen.worker_id or chosen.advertise or chosen.listen
    return service.run("worker", instance, lambda stop: app.run(chosen, stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
