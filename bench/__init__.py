"""Running inference servers and measuring them."""
