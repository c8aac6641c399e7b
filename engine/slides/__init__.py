"""Slides: reading them, tissue, tiles; and the procedural phantom."""
