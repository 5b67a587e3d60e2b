"""Core optimisers, one a file."""
