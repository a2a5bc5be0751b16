"""The driver: one rank's warm-up and requests, run or recorded."""
