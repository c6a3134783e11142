#!/usr/bin/env python3
"""The command ``fcos-d2`` for a checkout: python demo/demo.py INPUT... --config-file FILE ..."""

import sys

from fcos_d2.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
