"""Judging harm."""
