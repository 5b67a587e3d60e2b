"""Tables, exports and plots of certification results."""
