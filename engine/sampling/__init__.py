"""The algorithm: plan, schedule, tiles, averaging, guidance, and the loop over steps and levels."""
