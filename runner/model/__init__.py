"""Decoder layers, written as operations on ``Backend``, and the pipeline stage built from them."""
