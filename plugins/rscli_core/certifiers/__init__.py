"""Core certifiers, one a file."""
