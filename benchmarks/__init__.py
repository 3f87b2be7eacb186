"""Measurements of what edge_ser ships; run from a checkout with ``python -m benchmarks``."""
