"""Compare an export with the merged model it was made from."""
