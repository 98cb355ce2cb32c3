"""Raw counts of single cells become a shuffled, validated, compressed store."""
