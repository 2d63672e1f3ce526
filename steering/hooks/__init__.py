"""Applying interventions inside forward passes."""
