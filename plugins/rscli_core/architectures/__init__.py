"""Core architectures, one a file."""
