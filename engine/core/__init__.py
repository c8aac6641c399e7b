"""What every room stands on: errors, units, settings, command line, runtime, files, progress, streaming."""
