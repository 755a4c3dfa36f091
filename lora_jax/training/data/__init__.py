"""From a source's name to batches: TFDS builders and plain files, read through Grain."""
