"""Several processes on one machine, or on several, that train as one."""
