"""What a method remembers of earlier batches: plain buffers with exact state."""
