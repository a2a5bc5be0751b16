"""Sizes of models, layouts and warm-ups; environment variables; the codec of dataclasses."""
