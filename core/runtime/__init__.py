"""What both engines run on their device: masking routers, and counting what they select."""
