"""Compare finished runs: their recipes, their data and their scores on the same samples."""
