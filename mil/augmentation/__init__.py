"""Does synthetic data help? Arms of one protocol on the same patients, with controls."""
