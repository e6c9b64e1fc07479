"""Random changes of images and volumes, and simulated disease."""
