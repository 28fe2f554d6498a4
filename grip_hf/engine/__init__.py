"""One call of the language model: which visual tokens stay, and everything around it rewritten to fit."""
