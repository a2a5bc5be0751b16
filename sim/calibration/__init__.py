"""Measured runs: their scenarios, profiles fitted to them, and predictions held against them."""
