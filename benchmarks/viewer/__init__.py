"""Benchmarks of the viewer."""
