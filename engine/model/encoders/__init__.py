"""Encoders of self-supervised vectors: ViTs, texture, the demo's own."""
