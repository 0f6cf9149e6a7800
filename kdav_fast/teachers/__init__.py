"""What answers a batch for the student to learn from."""
