"""Benchmarks of the ops beside their peers: ``python -m benchmarks``."""
