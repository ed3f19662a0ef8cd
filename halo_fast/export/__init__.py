"""What was trained, under the names that other programs read."""
