"""Scorers of responses, one per file."""
