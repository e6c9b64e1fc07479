"""What is written for people and other systems about a segmented scan."""
