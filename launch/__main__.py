"""Entry of ``torchrun -m launch`` and ``python -m launch``."""

from __future__ import annotations

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
