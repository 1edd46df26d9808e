"""Executes step plans with a torch model."""

from services.worker.engines.torch.runner.decode_steps import DecodeSteps
from services.worker.engines.torch.runner.runner import TorchRunner

__all__ = ["DecodeSteps", "TorchRunner"]
