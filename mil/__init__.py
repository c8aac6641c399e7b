"""Bags of features in, a classifier and its evidence out; knows no Ray, no slides and no diffusion."""
