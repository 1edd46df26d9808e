"""The `torch` engine: our own models, paged KV cache and sampling, on CPU and CUDA.

Layers, top to bottom; imports go downward only:

    engine      composes: files → weights → model → runner → EngineCore
    runner      a StepPlan as tensors, through the model, to tokens
    models      one file per architecture
    layers      linear, norm, rope: what architectures are built of
    attention   the paged KV cache and the ways to attend over it
    sampling    logits → tokens, batched

beside them `weights`, which reads files and knows no model, and `device`.
"""

import os

# Idle OpenMP threads spin for milliseconds by default, and take the cores that the
# others need: with as many busy processes beside it as there are cores, a decode step
# took 450 ms instead of 30. libgomp reads this once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
