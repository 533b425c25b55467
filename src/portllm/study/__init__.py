"""The paper's experiment on any model: a file says which patches, updates and tasks, and what is missing is done."""
