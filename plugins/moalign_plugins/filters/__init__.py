"""Which of the sampled responses are trained on."""
