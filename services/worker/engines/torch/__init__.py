"""The `torch` engine: our own models, paged KV cache and sampling, on CPU and CUDA.

Layers, top to bottom; imports go downward only:

    engine      composes: files → weights → model → runner → EngineCore
    runner      a StepPlan as tensors, through the model, to tokens
    models      one file per architecture
    layers      linear, norm, rope: what architectures are built of
    attention   the paged KV cache and the ways to attend over it
    sampling    logits → tokens, batched

beside them `weights`, which reads files and knows no model, `device`, and `kernels`:
C for the CPU, below layers and attention.
"""

import os

# Threads that wait for each other spin, by default for milliseconds. Where cores are
# shared with other busy processes, they spin while the one they wait for wants the core:
# a decode step took 500 ms instead of 45. Spinning about as long as the gaps between
# two operations costs 7 % on idle cores and keeps a step at 100 ms on shared ones.
# libgomp reads this once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
