"""Who may call: TLS, client certificates, and bearer tokens for each method. Secrets come from the environment alone."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from recsys_core.errors import UserError
from recsys_core.settings import ServingSettings

EVERY_METHOD = "*"


class MissingSecret(UserError, ValueError):
    """A setting names a secret that is not there."""


def server_credentials(settings: ServingSettings) -> grpc.ServerCredentials | None:
    """TLS of the server, with client certificates when there is a CA for them; None without a certificate.

    Raises OSError, which names the setting, when a file can't be read or is none of its kind.
    """
    if not settings.tls_certificate:
        return None
    pair = (_pem(settings, "tls_key", "PRIVATE KEY"), _pem(settings, "tls_certificate", "CERTIFICATE"))
    ca = _pem(settings, "tls_client_ca", "CERTIFICATE") if settings.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _pem(settings: ServingSettings, name: str, kind: str) -> bytes:
    path = Path(getattr(settings, name))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(f"serving.{name} names {path}, which can't be read: {error.strerror}") from error
    if f"{kind}-----".encode() not in data:
        raise OSError(f"serving.{name} names {path}, which holds no {kind.lower()} in PEM format")
    return data


class Tokens:
    """The bearer tokens and what each may call. White space around a token is no part of it, here and in a call."""

    def __init__(self, methods: Mapping[str, Sequence[str]], environment: Mapping[str, str] = os.environ) -> None:
        """`methods` maps the name of a variable that holds a token to the methods that it opens.

        Raises MissingSecret when a variable is not set, or holds what no call can present.
        """
        tokens = {name: environment.get(name, "").strip() for name in methods}
        absent = [name for name, token in tokens.items() if not token]
        if absent:
            raise MissingSecret(f"serving.tokens names {', '.join(absent)}, which the environment does not set")
        odd = [name for name, token in tokens.items() if not (token.isascii() and token.isprintable())]
        if odd:
            raise MissingSecret(f"the token in {', '.join(odd)} has characters that no header can carry")
        self._opened = [(tokens[name].encode(), frozenset(opened)) for name, opened in methods.items()]

    def __bool__(self) -> bool:
        return bool(self._opened)

    def status(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> grpc.StatusCode:
        """OK, UNAUTHENTICATED without a known token, PERMISSION_DENIED with one that does not open the method."""
        given = next((value for key, value in metadata if key == "authorization"), "")
        scheme, _, token = (given if isinstance(given, str) else given.decode("latin-1")).partition(" ")
        known = False
        if scheme.lower() == "bearer":
            presented = token.strip().encode()
            for expected, opened in self._opened:
                if hmac.compare_digest(presented, expected):
                    known = True
                    if method in opened or EVERY_METHOD in opened:
                        return grpc.StatusCode.OK
        return grpc.StatusCode.PERMISSION_DENIED if known else grpc.StatusCode.UNAUTHENTICATED
