"""Text data: `sources` finds documents, `text` makes token streams of them, `batches` cuts these."""
