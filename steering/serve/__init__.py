"""The server: an OpenAI-compatible door to a model whose persona is watched and held while it talks."""
