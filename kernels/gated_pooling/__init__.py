"""Attention pooling of tiles: one vector per case and head from gated attention weights."""
