#!/usr/bin/env python3
"""Counts parameters and multiply-adds: python tools/analyze_model.py --help says how."""

import sys

from fcos_d2.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())
