"""Judge selectors: what they cost in time and memory, and what they keep in accuracy."""
