"""What the observations say: fitting, uncertainty, plots, the report."""
