"""Numbers and tables for people; `html` for pages."""
