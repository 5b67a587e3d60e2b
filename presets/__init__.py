"""Presets, one TOML file a row of a paper."""
