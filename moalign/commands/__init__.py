"""Groups of commands that would make cli.py long."""
