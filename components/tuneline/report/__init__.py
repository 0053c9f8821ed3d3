"""Write the one page that shows a run, and a record of what it came to.

Importing this loads neither kfp nor torch: the page is made from records, in the lightest image.
"""

from tuneline.report.failed import render_failed
from tuneline.report.run import run

__all__ = ["render_failed", "run"]
