"""Evaluate placements of yield marks and find the best one, without torch."""
