"""Write the HTML page of a run, and a record of the run's results."""
