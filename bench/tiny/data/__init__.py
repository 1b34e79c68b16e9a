"""What the packs are made of: sources, kinds of conversation, rendering, splitting."""
