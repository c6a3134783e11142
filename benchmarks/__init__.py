"""Benchmarks of the ops against their peers: ``python -m benchmarks``."""
