"""Procedural phantom slides: tissue, nuclei, noise, and whole slides of them."""
