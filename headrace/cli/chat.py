"""`headrace chat`: one prompt, the answer streamed to the terminal, over gRPC."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from headrace.cli.state import DEFAULT_GRPC, state_dir_option
from headrace.errors import StartupError

if TYPE_CHECKING:
    import grpc

    from headrace.supervisor import StateDir
    from headrace.v1 import inference_pb2_grpc

#: What a shell reports of a program that Ctrl-C ended.
EXIT_INTERRUPTED = 130
_TIMEOUT_S = 5.0


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", metavar="NAME", help="Which model. [the one that is served]")
@click.option("--max-tokens", type=int, metavar="N", help="Tokens at most. [what fits]")
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    default=0.2,
    show_default=True,
    help="0 is greedy, at most 2. Small models make little sense at 1.",
)
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--address", metavar="HOST:PORT", help="A gateway. [that of this machine's mesh]")
@state_dir_option
@click.pass_context
def chat(
    ctx: click.Context,
    prompt: str | None,
    model: str | None,
    max_tokens: int | None,
    temperature: float,
    system: str | None,
    address: str | None,
    state: StateDir,
) -> None:
    """Send PROMPT and print the answer as it comes. Ctrl-C ends it, here and on the engine.

    Without PROMPT, or with "-", the prompt is read from standard input.

    \b
    headrace chat "Why is the sky blue?"
    headrace chat --max-tokens 100 --temperature 0 "Name three rivers."
    git diff | headrace chat --system "Summarize this change." -
    headrace chat --address 10.0.0.5:50051 "Hello"
    """
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            click.echo("Write the prompt, then Ctrl-D:", err=True)
        prompt = sys.stdin.read()
    import grpc

    from headrace.rpc import options
    from headrace.v1 import inference_pb2, inference_pb2_grpc

    target = address or _address_of_mesh(state)
    settings = [("grpc.max_receive_message_length", options.MAX_MESSAGE_LEN)]
    with grpc.insecure_channel(target, options=settings) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            request = inference_pb2.GenerateRequest(model=model or _only_model(stub))
            if system:
                request.chat.messages.add(role="system", content=system)
            request.chat.messages.add(role="user", content=prompt)
            if max_tokens is not None:
                # Refused by the gateway, which names the limit, as far as the wire can carry it.
                request.sampling.max_tokens = max(0, max_tokens)
            request.sampling.temperature = temperature
            _print_answer(stub.Generate(request))
        except grpc.RpcError as error:
            raise StartupError(_explain(error, target)) from error
        except KeyboardInterrupt:
            click.echo()
            ctx.exit(EXIT_INTERRUPTED)


def _print_answer(call: Any) -> None:
    """Raises KeyboardInterrupt at Ctrl-C."""
    import grpc

    # A call that streams, which grpc types as one that does not.
    from headrace.v1 import types_pb2

    is_interrupted = False

    def on_interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        call.cancel()

    # Raised in the middle of grpc's callbacks, a KeyboardInterrupt can be lost.
    former = signal.signal(signal.SIGINT, on_interrupt)
    try:
        ended = types_pb2.FINISH_REASON_UNSPECIFIED
        for response in call:
            click.echo(response.text, nl=False)
            sys.stdout.flush()
            ended = response.finish_reason or ended
        click.echo()
        if ended == types_pb2.FINISH_REASON_LENGTH:
            click.echo("(cut off: max_tokens or the context's end)", err=True)
    except grpc.RpcError:
        if is_interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, former)
        call.cancel()


def _address_of_mesh(state: StateDir) -> str:
    from headrace.supervisor import is_running
    from headrace.supervisor.plan import local_address

    mesh = state.read()
    return local_address(mesh.grpc) if mesh is not None and is_running(mesh) else DEFAULT_GRPC


def _only_model(stub: inference_pb2_grpc.InferenceServiceStub) -> str:
    from headrace.v1 import inference_pb2

    models = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=_TIMEOUT_S).models
    names = [model.card.name for model in models]
    if len(names) != 1:
        served = ", ".join(names) or "none yet"
        raise StartupError(f"choose a model with --model; served: {served}")
    return names[0]


def _explain(error: grpc.RpcError, target: str) -> str:
    import grpc

    if not isinstance(error, grpc.Call):
        return str(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in str(error.details()).lower():
        return f"no gateway answers at {target}; start one with `headrace up`"
    return f"{error.details()} ({error.code().name})"
