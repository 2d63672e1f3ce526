"""lm-eval and Inspect."""
