"""The command line: one module a panel of commands."""
