"""Logits to tokens, batched; the token depends on logits, parameters, seed and position only."""

from services.worker.engines.torch.sampling.logprobs import score_prompts
from services.worker.engines.torch.sampling.sampler import SUPPORTED, Sampler

__all__ = ["SUPPORTED", "Sampler", "score_prompts"]
