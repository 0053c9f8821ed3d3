"""The form of a Hub ID, the name of a model or dataset on the Hugging Face Hub."""

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A name, or a namespace and a name: `gpt2`, `openai/gsm8k`."""
