"""Pools of urllib3 that use the proxy of the environment, which urllib3 alone does not."""

import urllib.parse
import urllib.request
from typing import Any

import urllib3


def http_pool(url: str, **options: Any) -> urllib3.PoolManager:
    """Return a pool for requests to a URL, through the proxy that the environment names for it.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are read as by the standard library.
    Certificates are checked with those in SSL_CERT_FILE, because OpenSSL does so.

    Args:
        url: the URL, whose scheme and host decide the proxy.
        options: arguments of urllib3.PoolManager.
    """
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2], proxies):
        return urllib3.PoolManager(**options)
    address = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
    user = urllib.parse.unquote(address.auth or "")
    headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
    return urllib3.ProxyManager(address._replace(auth=None).url, proxy_headers=headers, **options)
