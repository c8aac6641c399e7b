"""Bags of features in, a classifier and its evidence out; knows no Ray and no diffusion; slides only to show them."""
