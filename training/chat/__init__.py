"""Chat tuning."""
