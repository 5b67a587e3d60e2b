"""The images of a split, and how files become pixels."""
