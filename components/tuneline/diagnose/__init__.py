"""Say what failed, why, and what to change; or, after success, what was done.

Importing this loads neither kfp nor torch: it runs after everything else, in the lightest image.
"""

from tuneline.diagnose.run import Diagnosis, run

__all__ = ["Diagnosis", "run"]
