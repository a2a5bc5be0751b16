"""The event engine runs the ranks' programs in virtual time."""
