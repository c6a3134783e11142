#!/usr/bin/env python3
"""Draws what a training run reached: python tools/report.py --help says how."""

import sys

from fcos_d2.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
