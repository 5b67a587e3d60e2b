"""The engine: training, sampling, certification, prediction, and the files they write. It reports, and never prints."""
