"""The canvas on disk or in a bucket: arrays, commit marks, the run's state, locks and leases."""
