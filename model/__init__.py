"""FourM: one transformer from any set of modalities to any other, its masking, generation and checkpoints."""
