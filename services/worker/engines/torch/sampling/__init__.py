"""Logits to tokens, batched; the token depends on logits, parameters, seed and position only."""

from services.worker.engines.torch.sampling.sampler import SUPPORTED, SamplingBatch, sample

__all__ = ["SUPPORTED", "SamplingBatch", "sample"]
