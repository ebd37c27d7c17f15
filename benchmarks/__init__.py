"""Measurements of moalign beside its peers. Run from the repository's root: ``python -m benchmarks.fused_core``."""
