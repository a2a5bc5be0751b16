"""``Backend``, which the model's forward is written against, and the torch math behind it.

Import submodules directly: those whose names begin with ``torch_`` need torch.
"""
