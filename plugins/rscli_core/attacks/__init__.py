"""Core attacks, one a file."""
