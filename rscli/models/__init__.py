"""Networks with their normalisation, and model files."""
