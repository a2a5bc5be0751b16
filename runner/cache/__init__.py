"""Kernel caches on disk: keys, entries, and the tools that check, move and pack them."""
