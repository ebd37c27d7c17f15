"""Which policy a loss compares with, and how it follows the one that is trained."""
