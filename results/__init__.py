"""Result files of segmented scans, for people and for other systems."""
