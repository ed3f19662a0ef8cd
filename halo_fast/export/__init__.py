"""Trained adapters and networks, under the names that other programs read."""
