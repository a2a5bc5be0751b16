"""The decoder layers as operations against ``Backend``, and the pipeline stage made of them."""
