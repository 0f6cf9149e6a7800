"""What methods on feature maps and embeddings have in common."""
