"""Frozen encoders' hidden states on disk: format, reading by id, building from raw items."""
