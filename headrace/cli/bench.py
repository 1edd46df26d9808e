"""`headrace bench`: put load on a mesh or on any OpenAI-compatible server, and see how it does."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.cli.state import DEFAULT_GRPC, state_dir_option
from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from headrace.bench.clients import Client
    from headrace.bench.load import Level
    from headrace.bench.report import Live
    from headrace.bench.sample import Sample
    from headrace.bench.stats import Summary
    from headrace.bench.traces import Recorded
    from headrace.bench.workload import Prompts
    from headrace.supervisor import StateDir

_REFRESH_S = 0.25
DEFAULT_REQUESTS = 100
EXIT_ALL_FAILED = 1


class _Levels(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas, all above 0."""

    name = "N[,N…]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers separated by commas", param, ctx)
        if not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} must be more than 0", param, ctx)
        return numbers


_LEVELS = _Levels()
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("target", required=False)
@click.option("--model", default="", metavar="NAME", help="[the only one that is served]")
@click.option(
    "--concurrency", type=_LEVELS, help="Closed loop: so many clients, each asks when answered. [8]"
)
@click.option("--rate", type=_LEVELS, help="Open loop: so many requests a second, come what may.")
@click.option(
    "--arrival",
    type=click.Choice(["poisson", "constant"]),
    default="poisson",
    show_default=True,
    help="How an open loop's requests are spaced.",
)
@click.option(
    "--requests", type=click.IntRange(1), metavar="N", help="End a level after so many. [100]"
)
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), metavar="S", help="Or after so long."
)
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, metavar="N",
              help="Requests before each level that count for nothing.")  # fmt: skip
@click.option("--input-tokens", type=click.IntRange(1), default=256, show_default=True,
              metavar="N", help="Synthetic prompts: each one's own part, about.")  # fmt: skip
@click.option("--shared-prefix-tokens", type=click.IntRange(0), default=0, show_default=True,
              metavar="N", help="Synthetic prompts: a beginning common to a group.")  # fmt: skip
@click.option("--prefix-groups", type=click.IntRange(1), default=1, show_default=True,
              metavar="N", help="How many different beginnings there are.")  # fmt: skip
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True,
              metavar="N", help="Tokens to generate at most.")  # fmt: skip
@click.option("--prompts", type=_FILE, metavar="FILE", help="A prompt a line (.jsonl: objects).")
@click.option("--trace", type=_FILE, metavar="FILE", help="Mooncake's .jsonl or Azure's .csv.")
@click.option("--speed", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              metavar="X", help="Of the trace: 2 is twice as fast.")  # fmt: skip
@click.option("--chat/--completions", default=True, help="Which of the two APIs. [chat]")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T")
@click.option("--ignore-eos", is_flag=True, help="Always generate all tokens, where it is known.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), default=600.0,
              show_default=True, metavar="S", help="Longest that a request may take.")  # fmt: skip
@click.option("--seed", type=int, default=lambda: secrets.randbits(31), metavar="N",
              help="Of prompts and arrivals. [drawn: known prompts may be cached]")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(allow_dash=True, path_type=Path),
              metavar="FILE", help="Write all figures; - is stdout.")  # fmt: skip
@click.option("--plot", "plot_path", type=_FILE, metavar="FILE", help="Draw them (.png, .svg).")
@state_dir_option
@click.pass_context
def bench(ctx: click.Context, /, **given: Any) -> None:
    """Put load on TARGET and tell how fast it answers.

    TARGET is grpc://HOST:PORT (a Headrace gateway) or http://HOST:PORT/v1 (any server with
    OpenAI's API; $OPENAI_API_KEY is sent). Without it, the mesh of `headrace up`.

    \b
    headrace bench                                   8 clients, 100 requests
    headrace bench --concurrency 1,8,32 --plot load.png
    headrace bench --rate 2,4,8 --duration 60        users who don't wait for each other
    headrace bench --shared-prefix-tokens 2000 --prefix-groups 8
    headrace bench --trace conversation.jsonl --speed 2 http://127.0.0.1:8000/v1

    \b
    TTFT  from when a request was meant to start to its first output
    ITL   between one piece of output and the next (a piece may have several tokens)
    TPOT  from first to last output, by tokens after the first

    Closed loop (--concurrency) finds what a server can do; it asks less when answers are
    slow. Open loop (--rate, --trace) finds what users wait for: a request's time runs from
    its moment, even if the server's stall, or this client, delays it. Compare p99 there.

    Exits with 1 if no request succeeded.
    """
    options = _Given(given)
    if options.plot_path is not None:
        from headrace.bench import plot

        plot.check()
    import uvloop

    try:
        succeeded = uvloop.run(_bench(options))
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        ctx.exit(130)
    ctx.exit(0 if succeeded else EXIT_ALL_FAILED)


class _Given:
    """What was asked for, by the options' names."""

    target: str | None
    model: str
    concurrency: tuple[float, ...] | None
    rate: tuple[float, ...] | None
    arrival: Any
    requests: int | None
    duration: float | None
    warmup: int
    input_tokens: int
    shared_prefix_tokens: int
    prefix_groups: int
    output_tokens: int
    prompts: Path | None
    trace: Path | None
    speed: float
    chat: bool
    temperature: float
    ignore_eos: bool
    timeout_s: float
    seed: int
    json_path: Path | None
    plot_path: Path | None
    state: StateDir

    def __init__(self, given: dict[str, Any]) -> None:
        self.__dict__.update(given)
        self.recorded: list[Recorded] = []
        if self.concurrency and self.rate:
            raise click.UsageError("give --concurrency or --rate, not both")
        if self.prompts and self.trace:
            raise click.UsageError("give --prompts or --trace, not both")
        if any(not number.is_integer() for number in self.concurrency or ()):
            raise click.UsageError("--concurrency must be whole numbers")
        if self.trace:
            from headrace.bench import traces

            self.recorded = traces.read(self.trace, self.requests)

    def told(self) -> dict[str, Any]:
        """For the JSON: what was asked, no secrets, no paths of this machine's state."""
        skipped = ("state", "recorded", "json_path", "plot_path")
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.__dict__.items()
            if name not in skipped
        }


async def _bench(given: _Given) -> bool:
    from rich.console import Console

    from headrace.bench import load, plot, report
    from headrace.bench.clients import Options, client_for

    console = Console(stderr=given.json_path == Path("-"), highlight=False, soft_wrap=True)
    target = given.target or f"grpc://{_address_of_mesh(given.state)}"
    options = Options(
        model=given.model,
        chat=given.chat,
        temperature=given.temperature,
        ignore_eos=given.ignore_eos,
        timeout_s=given.timeout_s,
        api_key=os.environ.get("OPENAI_API_KEY", ""),
    )
    client = client_for(target, options)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    live = report.Live(Console(stderr=True))
    summaries: list[Summary] = []
    samples: list[Sequence[Sample]] = []
    try:
        model = await client.open()
        console.print(f"{model} at {target}, seed {given.seed}\n", markup=False)
        for index, level in enumerate(_levels(given)):
            # Other prompts at each level: the last one's would be cached.
            prompts = _prompts(given, given.seed + index).stream()
            warm = _prompts(given, -1 - given.seed - index).stream()
            await load.warm_up(client, warm, given.warmup)
            summary, its_samples = await _one(client, prompts, level, live)
            summaries.append(summary)
            samples.append(its_samples)
    finally:
        await client.close()
    report.show(console, summaries)
    if given.json_path is not None:
        document = report.Document(target, model, given.told(), started, summaries)
        report.write_json(given.json_path, document)
    if given.plot_path is not None:
        plot.draw(given.plot_path, f"{model} at {target}", summaries, samples)
        console.print(f"picture: {given.plot_path}", markup=False)
    return any(summary.succeeded for summary in summaries)


async def _one(
    client: Client, prompts: Iterator[Any], level: Level, live: Live
) -> tuple[Summary, list[Sample]]:
    from headrace.bench.load import run_level
    from headrace.service import cancel_and_wait

    async def refresh() -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            live.refresh()

    shown = asyncio.create_task(refresh()) if sys.stderr.isatty() else None
    try:
        return await run_level(client, prompts, level, live.start)
    finally:
        await cancel_and_wait(shown)
        live.stop()


def _levels(given: _Given) -> list[Level]:
    from headrace.bench.load import Level
    from headrace.bench.workload import arrivals

    requests = given.requests
    if requests is None and given.duration is None:
        requests = len(given.recorded) or DEFAULT_REQUESTS
    limits: dict[str, Any] = {"num_requests": requests, "duration_s": given.duration}
    if given.rate:
        return [
            Level(rate=rate, arrivals=arrivals(rate, given.arrival, given.seed), **limits)
            for rate in given.rate
        ]
    if given.recorded and not given.concurrency:
        moments = [recorded.at_s / given.speed for recorded in given.recorded]
        rate = len(moments) / max(moments[-1], 1e-9)
        return [Level(rate=rate, arrivals=iter(moments), **limits)]
    return [Level(concurrency=int(number), **limits) for number in given.concurrency or (8,)]


def _prompts(given: _Given, seed: int) -> Prompts:
    from headrace.bench.workload import FromTrace, Synthetic, read_prompts

    if given.recorded:
        return FromTrace(given.recorded, seed)
    if given.prompts:
        return read_prompts(given.prompts, given.output_tokens)
    return Synthetic(
        given.input_tokens,
        given.output_tokens,
        given.shared_prefix_tokens,
        given.prefix_groups,
        seed,
    )


def _address_of_mesh(state: StateDir) -> str:
    from headrace.supervisor import is_running
    from headrace.supervisor.plan import local_address

    mesh = state.read()
    if mesh is None or not is_running(mesh):
        raise StartupError(
            f"no mesh runs here: start one with `headrace up`, or name a target, for example "
            f"grpc://{DEFAULT_GRPC} or http://127.0.0.1:8080/v1"
        )
    return local_address(mesh.grpc)
