"""Other people's checkpoints: read, matched with a network, and turned into model files."""
