"""Rules that turn many objectives and a preference into one signal."""
