"""Forms of reward models that are trained on judgements."""
