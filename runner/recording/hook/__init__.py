"""What runs inside a recorded server: an import hook that notes each distinct DeepGEMM call.

The server's own Python imports this package, under another name and without the rest of
``runner`` (``site/sitecustomize.py``), so it uses the standard library only, and Python 3.10's.
A failure in here never reaches the server: recording stops, and says so.
"""
