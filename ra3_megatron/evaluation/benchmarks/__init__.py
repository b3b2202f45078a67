"""Benchmarks and task sets: readers of their files, each problem with its tests."""
