"""Benchmarks of picture quality."""
