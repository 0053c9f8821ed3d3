"""Look at rows and propose a recipe for them."""
