"""A kernel cache as a thing to keep: its manifest, and the tools that check, move and pack it."""
