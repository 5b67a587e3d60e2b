"""Core noises, one a file."""
