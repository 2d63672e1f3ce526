"""Making small models. Nothing is here yet."""
