"""Sandboxes on this machine: what it offers, how they are started, fed and ended."""
