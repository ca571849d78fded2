"""Certificates for tests of TLS, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

LOCALHOST = "DNS:localhost,IP:127.0.0.1"


def make_certificates(folder: Path, names: str = LOCALHOST) -> Path:
    """A CA, and of it a server of some names and a client; and a client of another CA: `<name>.pem` and `<name>.key`."""
    (folder / "names").write_text(f"subjectAltName={names}")
    for ca, signed in (("ca", ("server", "client")), ("other", ("stranger",))):
        new_ca = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={ca}"]
        _openssl(folder, *new_ca, "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
        for name in signed:
            new_key = ["req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
            _openssl(folder, *new_key, "-keyout", f"{name}.key", "-out", "csr")
            sign = ["x509", "-req", "-in", "csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "2"]
            _openssl(folder, *sign, "-extfile", "names", "-out", f"{name}.pem")
    return folder


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
