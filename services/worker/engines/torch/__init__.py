"""The `torch` engine."""
