"""Several processes, on one machine or on several, that train one model together."""
