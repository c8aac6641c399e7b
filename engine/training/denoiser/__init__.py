"""Training of the denoiser: loss, settings, validation, initial weights."""
