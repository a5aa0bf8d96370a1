"""What was asked for: a recipe from its file to a checked, frozen, resolved object. Never torch."""
