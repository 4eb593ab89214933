"""Attention with a two-dimensional ALiBi bias computed from grid cells (TITAN)."""
