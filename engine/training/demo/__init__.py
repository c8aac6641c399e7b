"""Training of the embedded demo model's autoencoder and encoder."""
