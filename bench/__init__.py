"""Benchmarks: each figure of the engine is taken beside its reference, in turns, in one run. See NOTES.md."""
