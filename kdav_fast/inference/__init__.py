"""A finished network at work: read from whatever file it lies in, and asked about images."""
