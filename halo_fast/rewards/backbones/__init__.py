"""Networks behind a reward model, a file each."""
