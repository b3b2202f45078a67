"""Corpus → snippets → trajectories (lines, decision points, token ids) → packed batches."""
