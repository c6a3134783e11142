#!/usr/bin/env python3
"""Draws and checks the datasets of a config: python tools/visualize_data.py --help says how."""

import sys

from fcos_d2.commands.visualize import main

if __name__ == "__main__":
    sys.exit(main())
