"""Write the page of a run, and a record of its results."""
