"""Checkpoints on disk: folders that are whole or not there, and what lies in them."""
