"""Ragged networks, one per pathway."""
