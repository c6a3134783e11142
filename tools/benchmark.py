#!/usr/bin/env python3
"""Measures training and inference: python tools/benchmark.py --help says how."""

import sys

from fcos_d2.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
