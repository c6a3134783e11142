"""Draws boxes, assignments, heat maps and training curves, without a display."""
