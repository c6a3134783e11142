#!/usr/bin/env python3
"""Writes a config for a folder of data: python tools/new_config.py --help says how."""

import sys

from fcos_d2.commands.new_config import main

if __name__ == "__main__":
    sys.exit(main())
