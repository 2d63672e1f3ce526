"""Sampling answers to many prompts in one batch."""
