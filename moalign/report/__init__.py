"""Tables, pictures and a page about a finished run, drawn from its directory alone."""
