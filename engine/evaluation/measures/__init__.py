"""Distances between sets of vectors: Fréchet, KID, MIND, coverage."""
