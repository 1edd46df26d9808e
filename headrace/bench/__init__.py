"""A load generator for anything that generates text: ours over gRPC, OpenAI's API over HTTP.

    workload ── prompts, moments ──> load ── client ──> target
                                       └─ a Sample each ──> stats ──> report, plot

`workload` and `traces` make requests, `clients` send them, `load` decides when, `stats`
computes what is told, `report` and `plot` tell it. No service is imported.
"""
