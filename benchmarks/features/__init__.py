"""Benchmarks of slides and features."""
