"""Labels, feature files, cohorts and splits."""
