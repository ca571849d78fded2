"""What a command says when something raises: one message for what a user can mend, one line and a log for a bug."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from recsys_core.errors import UserError
from recsys_core.masking import masked_text
from recsys_core.settings import DEBUG_VARIABLE, DEFAULT_HOME, HOME_VARIABLE

MENDABLE, BUG = 2, 1
"""Exit codes."""
LOG = "error.log"


def explain(error: Exception) -> str | None:
    """What to tell the user about an error that is theirs to mend, None for any other. It tells no secret."""
    message = _explained(error)
    return message and masked_text(message)


def _explained(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and not _is_of_a_client(error):
        return _told(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object!r} is no text in UTF-8, and no id is anything else"
    for module, of_module in _BY_MODULE.items():
        # An error of a package can't be raised where that was not imported.
        if module in sys.modules and (message := of_module(error)):
            return message
    return _of_storage(error)


def explain_bug(error: Exception) -> str:
    """One line on an error that nobody expected; the traceback goes to a file, or to standard error when that is wanted."""
    trace = masked_text("".join(traceback.format_exception(error)))
    if os.environ.get(DEBUG_VARIABLE):
        print(trace, file=sys.stderr)
    summary = masked_text(" ".join(str(error).split()))[:200]
    what = f"unexpected {type(error).__name__}: {summary}"
    return f"{what}\nThe traceback is in {_kept(trace)}; {DEBUG_VARIABLE}=1 shows it here."


def _kept(trace: str) -> Path:
    """The file that the traceback was written to: in the home if there is one, else a new one among what is temporary."""
    text = f"{masked_text(' '.join(sys.argv))}\n{trace}"
    home = Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    if home.is_dir():
        with suppress(OSError):
            (home / "run").mkdir(exist_ok=True)
            (home / "run" / LOG).write_text(text, errors="backslashreplace")
            return home / "run" / LOG
    with suppress(OSError):
        opened, name = tempfile.mkstemp(prefix="recsys-", suffix=f"-{LOG}")
        with open(opened, "w", errors="backslashreplace") as file:
            file.write(text)
        return Path(name)
    print(trace, file=sys.stderr)
    return Path("the lines above")


def _is_of_a_client(error: OSError) -> bool:
    """Errors of clients of servers that inherit from OSError have their own words."""
    return error.errno is None and type(error).__module__ != "builtins"


def _told(error: OSError) -> str:
    named = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{f' at {named}' if named else ''}: make room, and run the same command again"
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {named}" if named and named not in reason else reason


def _of_pydantic(error: Exception) -> str | None:
    from pydantic import ValidationError

    from recsys_cli.config import explain_invalid

    if not isinstance(error, ValidationError):
        return None
    lines = explain_invalid(error).splitlines()
    origins = getattr(error, "__notes__", [])
    return "\n".join(f"{origins[at]}: {line}" if at < len(origins) and origins[at] else line for at, line in enumerate(lines))


def _of_redis(error: Exception) -> str | None:
    import redis

    return (
        f"Redis says: {error} (`recsys up` starts one, [redis] names another)" if isinstance(error, redis.RedisError) else None
    )


def _of_kafka(error: Exception) -> str | None:
    from confluent_kafka import KafkaException

    if not isinstance(error, KafkaException):
        return None
    told = error.args[0].str() if error.args and hasattr(error.args[0], "str") else str(error)
    return f"the brokers say: {told} (`recsys up` starts one, kafka.bootstrap_servers names others)"


def _of_serving(error: Exception) -> str | None:
    from serving.client import RecsysError

    if not isinstance(error, RecsysError):
        return None
    hint = " (what is up: `recsys status`)" if error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED") else ""
    return f"the server says {error}{hint}"


def _of_storage(error: Exception) -> str | None:
    """botocore is there with `recsys[s3]` alone."""
    of_botocore = any(kind.__module__.startswith("botocore.") for kind in type(error).__mro__)
    return f"the object store says: {error}" if of_botocore else None


_BY_MODULE: dict[str, Callable[[Exception], str | None]] = {
    "pydantic": _of_pydantic,
    "redis": _of_redis,
    "confluent_kafka": _of_kafka,
    "serving.client": _of_serving,
}
