"""Choosing the floors of a cap."""
