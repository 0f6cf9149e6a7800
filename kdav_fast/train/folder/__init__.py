"""A run's folder: what a start finds there, what it writes down, what a complete run leaves."""
