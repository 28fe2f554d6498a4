"""Saving, sharing and finding scorers and pruned checkpoints."""
