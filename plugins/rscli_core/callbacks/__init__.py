"""Core callbacks, one a file."""
