"""What can be promised of a model's answers with fewer visual tokens, found out on the user's own data."""
