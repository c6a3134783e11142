"""Commands of ``fcos-d2`` and of the scripts in tools/; ``main`` of each module runs one."""
