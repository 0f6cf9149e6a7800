"""DeepSpeed around what is trained, and the settings that it takes."""
