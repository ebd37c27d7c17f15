"""Decoders: alignment at decoding time."""
