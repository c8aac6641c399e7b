"""Where a run's conditions come from: a reference, stored vectors, inversion of a guide, or the model's CDM."""
