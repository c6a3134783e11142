#!/usr/bin/env python3
"""Benchmarks training and inference. See: python tools/benchmark.py --help."""

import sys

from fcos_d2.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
