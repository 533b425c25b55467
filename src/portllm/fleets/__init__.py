"""Many patches through many updates: what a file asks for, cell by cell, on this machine's cores or on Ray."""
