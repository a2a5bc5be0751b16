"""Many simulations, their figures and their frontier."""
