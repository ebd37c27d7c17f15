"""Which preferences to train next."""
