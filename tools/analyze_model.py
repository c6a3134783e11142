#!/usr/bin/env python3
"""Counts parameters and multiply-adds. See: python tools/analyze_model.py --help."""

import sys

from fcos_d2.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())
