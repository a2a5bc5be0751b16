"""The driver: runs or records one rank's warm-up and requests."""
