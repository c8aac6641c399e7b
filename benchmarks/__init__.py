"""What we measure. Run from the project's folder: python -m benchmarks.NAME."""
