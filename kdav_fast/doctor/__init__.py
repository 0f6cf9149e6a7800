"""What this machine offers a run, and what is in its way."""
