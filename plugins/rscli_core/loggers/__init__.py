"""Core loggers, one a file."""
