"""Chest phantoms with nodules, written as DICOM series with LIDC-style annotations."""
