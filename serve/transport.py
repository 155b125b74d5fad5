"""The HTTP underneath `serve.client` and `serve.bench`: every failure is a ServerError that says
what the server said. Standard library only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse


class ServerError(RuntimeError):
    """The server refused or failed; `status` is the HTTP status, None when none came."""

    def __init__(
        self, message: str, status: int | None = None, retry_after_sec: float | None = None
    ):
        super().__init__(message)
        self.status = status
        self.retry_after_sec = retry_after_sec  # what the server asked for


def build_request(
    url: str, path: str, api_key: str | None, json_body: dict | None = None
) -> urllib.request.Request:
    request = urllib.request.Request(url.rstrip("/") + path)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    if json_body is not None:
        request.data = json.dumps(json_body).encode()
        request.add_header("Content-Type", "application/json")
    return request


def open_request(request: urllib.request.Request, timeout_sec: float) -> HTTPResponse:
    """Open, turning every failure into a ServerError with the server's own words."""
    try:
        return urllib.request.urlopen(request, timeout=timeout_sec)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            detail = json.loads(text)
            message = (detail.get("error") or {}).get("message") or detail.get("detail") or text
        except (ValueError, AttributeError):
            message = text
        after = error.headers.get("Retry-After", "")
        wait = float(after) if after.strip().isdigit() else None
        raise ServerError(f"{error.code}: {message}"[:1000], error.code, wait) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no answer from {request.full_url}: {reason}") from error


def read_some(response: HTTPResponse) -> bytes:
    """What has come by now, b"" at the end."""
    try:
        return response.read1(65536)
    except (OSError, HTTPException) as error:
        raise _broken(error) from error


def read_all(response: HTTPResponse) -> bytes:
    """The whole body. (`read_some` would take a body that is cut for a whole one.)"""
    try:
        return response.read()
    except (OSError, HTTPException) as error:
        raise _broken(error) from error


def _broken(error: Exception) -> ServerError:
    return ServerError(f"the server stopped in the middle of its answer: {error!r}")
