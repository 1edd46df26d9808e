"""The engines, by name; each is loaded only when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from headrace.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine import Engine, EngineConfig

ENGINES = {
    "torch": "services.worker.engines.torch.engine:TorchEngine",
    "sim": "services.worker.engines.sim.engine:SimEngine",
}


def create(name: str, config: EngineConfig, report: Callable[[str, float | None], None]) -> Engine:
    """Start the engine `name`. Raises StartupError if it is unknown or can't start."""
    if name not in ENGINES:
        raise StartupError(f"engine {name!r} is unknown; there are {', '.join(sorted(ENGINES))}")
    module, _, attribute = ENGINES[name].partition(":")
    try:
        engine_class = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise StartupError(
            f"engine {name!r} needs {error.name}: install the extra for it "
            f"(pip install 'headrace[{'worker-tensorrt-llm' if 'tensorrt' in name else 'worker'}]')"
        ) from error
    engine: Engine = engine_class(config, report)
    return engine
