"""Sampling, storage and slides of the ZoomLDM engine; imports neither ray nor mil."""

__version__ = "0.1.0"
