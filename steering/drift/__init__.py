"""Persona drift over conversations."""
