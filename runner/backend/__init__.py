"""``Backend``, the interface that the model's forward uses, and the torch math behind it.

Import submodules directly: modules named ``torch_*`` need torch.
"""
