"""Compare an export with the merged model that it was made from."""
