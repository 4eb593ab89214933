"""Slides to tile features: readers, tissue, tiling, encoders, stores. No training, no adapter."""
