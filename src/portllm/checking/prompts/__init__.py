"""What a patch does on a user's prompts, as numbers and in words."""
