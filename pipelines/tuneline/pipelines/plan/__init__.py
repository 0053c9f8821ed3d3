"""Compare what a run needs with what is available, before anything is started."""
