"""What the samples of a file mean: colours, validity (alpha, nodata, masks), and streams that were cut."""
