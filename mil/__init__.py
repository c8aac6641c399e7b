"""Bags of features in, a classifier and its evidence out; knows no Ray and no diffusion, and opens slides only to show them."""
