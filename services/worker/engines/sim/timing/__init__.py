"""What a simulated step takes, one model a file.

A model is named by a *spec*, NAME or NAME:KEY=VALUE,…:

    linear:step_ms=10,prefill_ms_per_token=0.1
    polynomial
    roofline:gpu=h100,model=llama-3.1-70b,dtype=fp8,tp=4
"""

from services.worker.engines.sim.timing.base import StepTiming, StepWork
from services.worker.engines.sim.timing.specs import TIMINGS, Defaults, create

__all__ = ["TIMINGS", "Defaults", "StepTiming", "StepWork", "create"]
