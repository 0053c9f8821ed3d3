"""Check that an account of the Hub may write to a namespace, before anything is made for it."""

import os
import re
from typing import Any

from tuneline.errors import CredentialsError
from tuneline.publish.hub import call, new_api

TOKEN_VARIABLE = "HF_TOKEN"


def check_account(token: str, target: str) -> str:
    """Return the name of the token's account, if it may write to the repository `target`.

    Raises:
        CredentialsError: the Hub does not accept the token, or the token may not write there.
        HubError: the Hub could not be reached.
    """
    account: dict[str, Any] = call("look up the token in HF_TOKEN", new_api(token).whoami, 1)
    name = str(account["name"])
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise CredentialsError(
            f"HF_TOKEN of {name} may only read, but {target} has to be written: create a token "
            "with write access"
        )
    writable = [name, *(str(organisation["name"]) for organisation in account.get("orgs", ()))]
    namespace = target.partition("/")[0]
    if namespace not in writable:
        raise CredentialsError(
            f"HF_TOKEN is of {name}, which is no member of {namespace}: publish to one of "
            f"{', '.join(f'{each}/...' for each in writable)}"
        )
    return name


def read_token(target: str) -> str:
    """Return the Hub token. No message may contain it.

    Raises:
        CredentialsError: the variable is empty, or holds something else than a token.
    """
    # A secret made from a file ends in a line break. HTTP clients refuse a header with a line break
    # in a message that quotes it.
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise CredentialsError(
            f"publishing to {target} needs a token with write access in the environment variable "
            f"{TOKEN_VARIABLE}. Set it (on a cluster: the secret placement.hub_token_secret), or "
            "publish to dir:PATH"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise CredentialsError(
            f"{TOKEN_VARIABLE} is not a valid token: it contains white space or characters that "
            "are not ASCII. Set it to the token alone, as huggingface.co/settings/tokens shows it"
        )
    return token
