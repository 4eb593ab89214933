"""Benchmarks: one file per kernel and one per stage; every figure in a document is a row here."""

import os

# As the command line does (modaltune/cli.py), for benchmarks that are run by themselves.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# The profiler looks for a GPU, and complains.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
