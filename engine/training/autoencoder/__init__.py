"""Training of the VQ autoencoder."""
