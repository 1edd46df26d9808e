"""KV blocks and the prefix cache, as numbers. No tensors."""
