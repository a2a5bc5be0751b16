"""The only package that calls DeepGEMM, through SGLang's entry points and walks.

Import submodules directly: most need torch.
"""
