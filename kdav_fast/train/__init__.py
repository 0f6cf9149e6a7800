"""From a config to a trained student: set-up, loop, engine, checkpoints."""
