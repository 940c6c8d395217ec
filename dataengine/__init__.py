"""The engine: corpora in, aligned multimodal shards out, exactly once. Knows no labeler, no model, no torch."""
