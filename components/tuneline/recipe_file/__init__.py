"""Read the file of a recipe: YAML 1.2 with line numbers, paths, and keys of other tools."""
