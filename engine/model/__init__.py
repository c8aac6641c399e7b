"""The diffusion model: bundle, conditioner, checkpoint layouts and SSL encoders."""
