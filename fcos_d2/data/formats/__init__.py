"""Reads annotation files of various formats, and converts them to COCO without repairs."""
