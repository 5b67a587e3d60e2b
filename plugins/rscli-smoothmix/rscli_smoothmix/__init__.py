"""SmoothMix for rscli."""
