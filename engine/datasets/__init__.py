"""Training sets: what `engine.prepare` writes and training reads."""
