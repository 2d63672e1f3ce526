"""The stages of a run: sample, judge, record."""
