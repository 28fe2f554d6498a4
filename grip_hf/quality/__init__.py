"""Promise a quality instead of a ratio: see README.md in this folder."""
