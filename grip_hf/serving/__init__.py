"""GRIP inside servers that are not transformers."""
