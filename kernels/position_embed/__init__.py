"""Positions and cls token, without a table."""
