#!/usr/bin/env python3
"""Writes a config for a folder of data. See: python tools/new_config.py --help."""

import sys

from fcos_d2.commands.new_config import main

if __name__ == "__main__":
    sys.exit(main())
