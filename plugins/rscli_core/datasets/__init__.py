"""Core datasets, one a file."""
