"""Statistics of comparisons: intervals and tests for figures measured on the same snippets, or over seeds."""
