"""Augmentation of images and volumes, and simulated pathology."""
