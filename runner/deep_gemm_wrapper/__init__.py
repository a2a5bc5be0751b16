"""The one place that calls DeepGEMM, with SGLang's entry points and walks.

Import submodules directly: most need torch.
"""
