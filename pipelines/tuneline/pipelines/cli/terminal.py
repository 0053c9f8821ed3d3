"""Output of the commands."""

from rich.console import Console

from tuneline.runtime.printable import printable

# rich would show :x: in a text as a picture.
console = Console(emoji=False)


def say(text: str) -> None:
    """Print `text` as it is: no markup, no colours, no line breaks of rich's own."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
