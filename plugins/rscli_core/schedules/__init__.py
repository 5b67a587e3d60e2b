"""Core learning-rate schedules, one a file."""
