"""How many seconds ranks wait for each other before a run ends."""

TORCH_TIMEOUTS = {"nccl": 600.0, "gloo": 1800.0}
"""Default time-outs of collectives in torch 2, by backend."""

HOST_TIMEOUT = 7200.0
"""How long SGLang's hosts wait for each other (0.5.23, ``parallel_state.py``)."""

TORCH_TIMEOUTS_HELP = "torch's: {nccl:.0f} over NCCL, {gloo:.0f} over gloo".format(**TORCH_TIMEOUTS)
"""The defaults in the words of ``--nccl-timeout``'s help."""
