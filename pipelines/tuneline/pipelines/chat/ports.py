"""The address that the page and the API listen on."""

import errno

ADDRESS = "127.0.0.1"


def port_problem(port: int, error: OSError) -> str:
    """Return why a port cannot be listened on."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another program: name another one with --port"
    return f"port {port} cannot be listened on ({error.strerror}): name another one with --port"
