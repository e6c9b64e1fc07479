"""Nodules: readers' outlines, shapes, connected components and measurements in mm."""
