"""Pruning inside the vision tower: patch rows that leave the sequence between two of its layers."""
