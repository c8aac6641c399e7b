"""Slides: so far the procedural phantom."""
