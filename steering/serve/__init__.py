"""An OpenAI-compatible server for a model whose persona is measured and, if asked, capped in every answer."""
