"""Reward models: trained on judgements with the engine that trains policies, reported on, written and read again."""
