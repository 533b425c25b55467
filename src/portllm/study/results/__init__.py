"""What a study found, as a table and as pages."""
