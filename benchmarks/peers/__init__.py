"""Other systems as child processes, each in an environment of its own."""
