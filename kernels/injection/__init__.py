"""Tiles attend to the modal tokens of their case."""
