"""Making small models: GPTs that are ordinary checkpoints, and subjects of everything else here."""
