"""Runs the command ``fcos-d2``: ``python -m fcos_d2``."""

import sys

from .commands.cli import main

sys.exit(main())
