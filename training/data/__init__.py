"""Corpora and tokens."""
