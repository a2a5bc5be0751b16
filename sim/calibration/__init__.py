"""Measured runs: their scenarios, profiles fitted to them, and errors of predictions."""
