"""Loading decoders, chat templates, token spans and activation hooks."""
