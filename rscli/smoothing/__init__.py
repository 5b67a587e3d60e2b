"""Certification and prediction with a smoothed classifier."""
