"""The self-check: tiny models of the supported families, pruned and compared with an independent reference."""
