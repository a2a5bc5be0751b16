"""How many seconds ranks wait for each other before a run ends."""

TORCH_TIMEOUTS = {"nccl": 600.0, "gloo": 1800.0}
"""What torch 2 lets a collective wait by default, by backend."""

HOST_TIMEOUT = 7200.0
"""What SGLang lets its hosts wait for each other (0.5.23, ``parallel_state.py``)."""

TORCH_TIMEOUTS_HELP = "torch's: {nccl:.0f} over NCCL, {gloo:.0f} over gloo".format(**TORCH_TIMEOUTS)
"""The defaults as the help of ``--nccl-timeout`` shows them."""
