"""Weights on disk and on the Hub: the LDM layout, our folders, the CDM's files."""
