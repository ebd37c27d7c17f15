"""Losses on token log-probabilities."""
