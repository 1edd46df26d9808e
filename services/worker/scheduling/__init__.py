"""Which sequences the next step computes. No tensors, no clock but the one handed in."""
