"""A Pareto sweep: search -> candidates -> engine -> outcomes -> journal, in a run directory that survives a crash."""
