"""What is kept of a run for people and programs to look at."""
