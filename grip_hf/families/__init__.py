"""Facts about each family of vision-language models."""
