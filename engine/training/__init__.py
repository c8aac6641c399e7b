"""What `python -m engine.train` calls."""
