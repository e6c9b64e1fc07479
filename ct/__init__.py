"""One CT scan: voxels in HU, geometry, file format and conversion to network input."""
