"""What is compared: sets of crops, their vectors, training references."""
