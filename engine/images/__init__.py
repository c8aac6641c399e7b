"""Finished pictures: OME-Zarr, pyramids, exports, and figures read off their pixels."""
