"""Running multi-turn conversations."""
