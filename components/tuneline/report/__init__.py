"""Write the page that shows a run, and a record of its results."""
