"""Models, layouts and warm-up policies; environment variables; dataclasses as options and JSON."""
