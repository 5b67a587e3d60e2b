"""Presets, one TOML file for each row of the paper."""
