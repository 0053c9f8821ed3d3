"""How a chat template refuses a conversation."""

from jinja2 import TemplateError

REFUSALS = (
    TemplateError,
    # A template that meets a value of another type or size than it expects fails in Python.
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What rendering a chat template raises if the template does not accept the conversation."""
