"""What a study tells people: figures, pages, overlays, attended tiles."""
