"""Tile encoders: a registry with enforced metadata, and one runtime per file."""
