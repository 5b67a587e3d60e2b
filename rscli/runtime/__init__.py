"""What everything runs on: devices and memory, random keys, signals, progress, whole files."""
