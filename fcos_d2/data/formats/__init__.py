"""Annotation files of all kinds, read as they are into the form of a COCO file."""
