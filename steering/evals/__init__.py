"""Capped against uncapped: suites, judges, statistics, and the field's own harnesses."""
