"""What may be wrong with the images of a data set, looked for before training meets it."""
