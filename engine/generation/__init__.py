"""A whole run: from a configuration to a finished run folder, and what is done with one afterwards."""
