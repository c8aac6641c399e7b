"""Benchmarks of sampling."""
