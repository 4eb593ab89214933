"""Tile normalisation: uint8 tiles to standardised network input."""
