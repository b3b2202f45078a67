"""What a run writes for people: metrics, progress on the terminal, and the report."""
