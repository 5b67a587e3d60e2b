"""CAT-RS for rscli."""
