"""What became of each label: counts, their table, and their part of a page."""
