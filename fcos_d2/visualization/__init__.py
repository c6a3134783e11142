"""Boxes, assignments, heat maps and training curves as images."""
