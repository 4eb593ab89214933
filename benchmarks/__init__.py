"""Benchmarks: one file per kernel and one per stage; every figure in a document is a row here."""
