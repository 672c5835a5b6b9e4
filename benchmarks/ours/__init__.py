"""burnish as a child process: what a user of each entry point gets."""
