"""What any program may need of its machine: who holds a folder, what ends a run, what is installed."""
