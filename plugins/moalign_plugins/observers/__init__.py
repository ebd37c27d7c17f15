"""Trackers: each shows every candidate under a name of its own, so that their curves lie beside each other."""
