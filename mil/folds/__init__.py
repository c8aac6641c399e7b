"""Cross-validation: configuration, folds, results."""
