"""Copies of the picture for other people's viewers: one file per family of formats."""
