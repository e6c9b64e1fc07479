"""Windows and pages to look at scans, masks and nodules."""
