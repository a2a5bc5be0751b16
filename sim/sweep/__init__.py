"""Run many simulations, and find the frontier of their results."""
