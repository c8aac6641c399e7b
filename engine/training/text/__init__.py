"""Training of the text prior: captions → SSL vectors of the regions they describe."""
