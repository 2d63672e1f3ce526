"""The role bank: roles, questions and traits."""
