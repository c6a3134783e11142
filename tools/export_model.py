#!/usr/bin/env python3
"""Exports a trained detector. See: python tools/export_model.py --help."""

import sys

from fcos_d2.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
