"""Making small models of one's own: texts to tokens so far."""
