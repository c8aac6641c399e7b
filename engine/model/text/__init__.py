"""Text → SSL grid: text towers, the prior over grids, and its sampler."""
