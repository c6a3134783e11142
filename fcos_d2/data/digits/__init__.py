"""Generates the built-in datasets ``digits_train`` and ``digits_val``."""
