#!/usr/bin/env python3
"""Converts weights of other implementations. See: python tools/convert_weights.py --help."""

import sys

from fcos_d2.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
