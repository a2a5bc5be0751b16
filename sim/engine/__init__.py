"""The event engine: programs of ranks in virtual time."""
