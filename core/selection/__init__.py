"""From scores to a mask."""
