"""What shapes the rewards of sampled responses before they are combined."""
