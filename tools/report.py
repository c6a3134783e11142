#!/usr/bin/env python3
"""Writes a report of a training run. See: python tools/report.py --help."""

import sys

from fcos_d2.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
