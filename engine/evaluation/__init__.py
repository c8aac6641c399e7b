"""How good pictures are: figures of sets of crops and of canvases, each beside what it should be read against."""
