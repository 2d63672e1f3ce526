"""Judges of role play: rules, a local model, an endpoint."""
