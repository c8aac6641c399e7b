"""Fitting one classifier: training loop, calibration, metrics, stored models."""
