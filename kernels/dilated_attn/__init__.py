"""Dilated attention of LongNet."""
