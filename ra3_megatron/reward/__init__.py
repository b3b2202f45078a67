"""Judging of programs by tests, in a sandbox, without torch."""
