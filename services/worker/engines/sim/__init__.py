"""The `sim` engine."""
