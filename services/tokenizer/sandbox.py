"""Where chat templates run: jinja2's immutable sandbox, with limits.

A template is a program that came with a model's files. Here it can't touch Python,
change what it is given, or take more than its limits:

- time, by a signal that interrupts it between two steps of the interpreter;
- turns of its loops, counted;
- the size of each text or list that it makes by `*`, `%`, `join`, `replace`, padding or
  a block that is captured, and the bits of its numbers, before they are made;
- memory, by the kernel's limit, for what is left, such as texts that grow by `+`: the
  above give clear errors and end what no signal can interrupt, this one holds.

It knows no chats and no models.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

    from jinja2.compiler import Frame
    from jinja2.ext import Extension
    from jinja2.runtime import Context

#: Binary digits of a number.
_MAX_BITS = 4096
#: Elements of a list.
_MAX_ITEMS = 1 << 20
#: How often a signal comes again that a destructor swallowed, in s.
_REPEAT_S = 0.05
#: Several of the interpreter's arenas.
_RESERVE_LEN = 4 << 20
_PAGE_LEN = resource.getpagesize()
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take."""

    #: Characters that it may make, in one piece and in all.
    max_len: int
    seconds: float = 2.0
    max_turns: int = 500_000
    #: More than the process has already.
    max_bytes: int = 256 << 20


class LimitExceeded(BaseException):
    """A rendering took too much. Not an Exception: no template's handler may swallow it."""


class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering at a time, in the process's main thread, within `limited`."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, extensions: Sequence[type[Extension]] = ()) -> None:
        self._limits = RenderLimits(max_len=1 << 20)
        self._turns_left = 0
        # Not optimized: constants would be folded while compiling, outside all limits.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, *extensions],
        )
        self.globals["namespace"] = _Namespace
        for name in ("center", "indent", "batch"):
            self.add_filter(name, self.filters[name])
        self.filters["replace"] = self._checked_replace
        self.filters["join"] = self._checked_join(self.filters["join"])

    def add_filter(self, name: str, apply: Callable[..., Any]) -> None:
        """Let templates call `apply` as a filter, with no larger numbers than texts are long."""
        self.filters[name] = self._with_checked_numbers(name, apply)

    def limited(self, limits: RenderLimits) -> AbstractContextManager[None]:
        """Within it a template may take so much. Raises LimitExceeded."""
        self._limits, self._turns_left = limits, limits.max_turns
        return _ProcessLimits(limits)

    @property
    def turn(self) -> None:
        """A loop goes round. Compiled into every loop's body: templates' calls cost more."""
        self._turns_left -= 1
        if self._turns_left < 0:
            raise LimitExceeded(f"loops more than {self._limits.max_turns:,} times")

    def concat(self, parts: Iterable[str]) -> str:
        """What a macro, a captured block or a filtered block wrote."""
        parts = list(parts)
        self._check_len(sum(map(len, parts)))
        return "".join(parts)

    def check_nodes(self, value: Any) -> None:
        """Refuse a value that is made of too many, each counted as often as it is used."""
        left, waiting = _MAX_ITEMS, [value]
        while waiting:
            item = waiting.pop()
            inner = item.values() if isinstance(item, dict) else item
            if isinstance(item, (dict, list, tuple)):
                left -= len(item)
                if left < 0:
                    raise LimitExceeded(f"writes more than {_MAX_ITEMS:,} values as JSON")
                waiting.extend(inner)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment."""
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * abs(right))
        elif isinstance(left, str):
            self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See SandboxedEnvironment."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            count = nodes.ExprStmt(nodes.EnvironmentAttribute("turn"), lineno=loop.lineno)
            loop.body.insert(0, count)
        tree.set_environment(self)
        return tree

    def _check_method(self, owner: str, name: str, args: tuple[Any, ...]) -> None:
        if name in _PADDING:
            width = args[0] if args and isinstance(args[0], int) else 8
            self._check_len(width * (owner.count("\t") if name == "expandtabs" else 1))
        elif name == "replace" and len(args) > 1:
            self._check_replacing(owner, args[0], args[1])
        elif name == "join" and args and isinstance(args[0], (list, tuple)):
            self._check_joining(owner, args[0])

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, (str, bytes, list, tuple)) and isinstance(times, int):
                self._check_size(sized, len(sized) * times)

    def _check_format(self, form: str, values: Any) -> None:
        """A width or precision is a run of digits, or a value for a `*`."""
        digits = "".join(char if char.isdecimal() else " " for char in form).split()
        numbers = values if isinstance(values, (list, tuple)) else [values]
        stars = [n for n in numbers if isinstance(n, int)] if "*" in form or "{" in form else []
        if any(len(run) > 9 for run in digits):
            self._check_len(10**9)
        self._check_len(max([*map(int, digits), *stars], default=0))

    def _check_replacing(self, text: str, old: Any, new: Any) -> None:
        old, new = str(old), str(new)
        self._check_len(len(text) + text.count(old) * max(0, len(new) - len(old)))

    def _check_joining(self, between: str, values: Sequence[Any]) -> None:
        self._check_len(
            len(between) * len(values) + sum(len(v) for v in values if isinstance(v, str))
        )

    def _check_size(self, kind: Any, length: int) -> None:
        if isinstance(kind, (str, bytes)):
            self._check_len(length)
        elif length > _MAX_ITEMS:
            raise LimitExceeded(f"makes a list of {length:,} elements, the limit is {_MAX_ITEMS:,}")

    def _check_len(self, length: int) -> None:
        if length > self._limits.max_len:
            raise LimitExceeded(f"makes more than {self._limits.max_len:,} characters")

    def _with_checked_numbers(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(apply)
        def checked(*args: Any, **kwargs: Any) -> Any:
            limit = min(self._limits.max_len, _MAX_ITEMS)
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, int) and value > limit:
                    raise LimitExceeded(f"gives {value:,} to {name}, the limit is {limit:,}")
            return apply(*args, **kwargs)

        return checked

    def _checked_replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        whole = str(text)
        self._check_replacing(whole, old, new)
        return whole.replace(str(old), str(new), -1 if count is None else count)

    def _checked_join(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(apply)
        def checked(context: Any, values: Any, d: str = "", attribute: Any = None) -> Any:
            values = list(values)
            if attribute is None:
                self._check_joining(str(d), values)
            return apply(context, values, d, attribute)

        return checked


class _Namespace(Namespace):
    """No attribute of Python's own can be set on it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


class _Compiler(CodeGenerator):
    """Computes nothing while compiling."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


Sandbox.code_generator_class = _Compiler


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise LimitExceeded(f"makes a number of more than {_MAX_BITS:,} bits")


class _ProcessLimits:
    """Time and memory. What runs in it gets LimitExceeded in the main thread when its time
    is up, and MemoryError, which leaves as LimitExceeded, when it takes too much."""

    def __init__(self, limits: RenderLimits) -> None:
        self._seconds = limits.seconds
        self._max_bytes = limits.max_bytes
        self._is_running = True

    def __enter__(self) -> None:
        self._handler = signal.signal(signal.SIGALRM, self._on_alarm)
        self._limits = resource.getrlimit(resource.RLIMIT_DATA)
        soft, hard = self._limits
        limit = _data_bytes() + self._max_bytes
        if resource.RLIM_INFINITY != soft < limit:
            limit = soft
        #: Given back first: taking the limit away needs some memory too.
        self._reserve = mmap.mmap(-1, _RESERVE_LEN, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        # What is raised in a destructor is lost: it comes again until it arrives.
        signal.setitimer(signal.ITIMER_REAL, self._seconds, _REPEAT_S)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._is_running = False
        finally:
            self._reserve.close()
            resource.setrlimit(resource.RLIMIT_DATA, self._limits)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler)
        if kind is MemoryError:
            raise LimitExceeded(f"needs more than {self._max_bytes >> 20} MiB") from None

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_running:
            raise LimitExceeded(f"takes more than {self._seconds:g} s")


def _data_bytes() -> int:
    """What RLIMIT_DATA counts: private memory that can be written (proc(5), statm)."""
    handle = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(handle, 256).split()[5]) * _PAGE_LEN
    finally:
        os.close(handle)
