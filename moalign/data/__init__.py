"""From a data file to batches: rows, records, sequences, pairs. Nothing here knows a model or a loss."""
