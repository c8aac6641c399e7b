"""Benchmarks of multiple-instance learning."""
