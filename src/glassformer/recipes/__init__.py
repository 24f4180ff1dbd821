"""Recipes: one file, one run. Copy one and change it; ``glassformer train path/to/copy.py`` runs it."""
