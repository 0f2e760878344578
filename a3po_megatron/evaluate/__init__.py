"""Benchmarks, what their numbers say, and how two of them are held against each other."""
