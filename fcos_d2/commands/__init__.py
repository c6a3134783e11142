"""The commands behind ``fcos-d2`` and the scripts in tools/: ``main`` of each module is one."""
