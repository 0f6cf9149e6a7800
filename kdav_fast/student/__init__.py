"""The network that is trained, and the file that it is kept in."""
