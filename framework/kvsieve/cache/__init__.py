"""The KV cache: storage, what a policy sees of it, and a transformers cache layer on top."""
