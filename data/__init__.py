"""Files to views: what is on disk, which part of it is used when, and the batches a model sees."""
