"""Documents that people read and write: tables in, pages out."""
