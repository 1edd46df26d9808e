"""One replay, in the environment where Dynamo is: a job in, its summary out, as JSON.

It imports nothing of ours: that environment has none of it.
"""

from __future__ import annotations

import json
import sys

from dynamo.llm import KvRouterConfig
from dynamo.replay import run_trace_replay


def main() -> None:
    job = json.loads(sys.argv[1])
    report = run_trace_replay(
        [job["trace"]],
        num_workers=job["num_workers"],
        router_mode=job["router_mode"],
        arrival_speedup_ratio=job["speed"],
        trace_block_size=job["trace_block_size"],
        extra_engine_args={
            "engine": {"block_size": job["block_size"], "num_gpu_blocks": job["num_blocks"]}
        },
        router_config=KvRouterConfig() if job["router_mode"] == "kv_router" else None,
    )
    print(json.dumps(report.summary))


if __name__ == "__main__":
    main()
