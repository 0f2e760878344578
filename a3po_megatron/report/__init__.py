"""What is read back from run folders: records, the HTML page that compares runs, a figure of curves."""
