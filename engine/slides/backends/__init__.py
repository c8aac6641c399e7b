"""Who decodes a slide: one file per library, all behind `levels.Levels`."""
