"""Readers of dataset formats, one per file. A row that cannot be taken is refused with file and line."""
