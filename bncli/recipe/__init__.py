"""Recipes: from a YAML file to a checked, frozen, resolved object. No torch."""
