"""One CT scan: its voxels in HU, its geometry, its file, and how it becomes a network input."""
