"""Feature extraction: encoders over tiles, bags on disk, their schema, reader, writer and exports."""
