"""The core plugins, found through the same entry points as anybody else's."""
