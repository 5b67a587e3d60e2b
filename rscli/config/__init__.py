"""The configuration: its schema, presets, and layers that remember where each value came from."""
