"""Work over many slides, block by block: stages, outcome per slide, reports."""
