#!/usr/bin/env python3
"""Draws and checks the datasets of a config. See: python tools/visualize_data.py --help."""

import sys

from fcos_d2.commands.visualize import main

if __name__ == "__main__":
    sys.exit(main())
