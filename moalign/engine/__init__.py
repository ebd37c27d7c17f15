"""The training engine: one loop over LoRA adapters on one frozen base, for data from files and from the policy."""
