"""Recipes: how a smaller checkpoint is made, as a file; running them; and lockfiles that pin what they were run on."""
