"""Core losses, one a file."""
