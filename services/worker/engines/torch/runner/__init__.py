"""Executes step plans with a torch model."""

from services.worker.engines.torch.runner.runner import TorchRunner

__all__ = ["TorchRunner"]
