"""What the model's forward is written against, and its interpreters.

``Backend`` turns each step into an operation and hands it to a sink; the math behind it is either
shapes alone (``shapes``) or torch (``torch_math``). Import submodules directly: the torch ones
need torch.
"""
