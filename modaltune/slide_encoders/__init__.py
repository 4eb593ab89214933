"""Frozen slide-level foundation models behind one protocol (embed, blocks, pool)."""
