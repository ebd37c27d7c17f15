"""The tiny assistant and its world, whose best front is known exactly."""
