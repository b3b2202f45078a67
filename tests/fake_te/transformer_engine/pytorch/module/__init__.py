"""Base module helpers."""
