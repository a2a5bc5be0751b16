"""What a placement of yield marks is worth, and the best one. No torch."""
