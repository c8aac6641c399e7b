"""Training of the CDM, which draws conditions."""
