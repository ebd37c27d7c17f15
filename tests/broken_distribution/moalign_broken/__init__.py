"""Two entry points that cannot be loaded, each as it happens to an author on whose own machine they can."""
