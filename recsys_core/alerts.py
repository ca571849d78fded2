"""Alerts: what there is to tell, and its delivery to a Slack-compatible webhook and by mail."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Protocol

from recsys_core.log_lines import escaped
from recsys_core.masking import masked_text
from recsys_core.settings import AlertSettings


class NotDelivered(Exception):
    """A channel did not take an alert after all attempts; the message says why.

    `for_good`: it is this alert that is refused, and would be again.
    """

    def __init__(self, message: str, for_good: bool = False) -> None:
        super().__init__(message)
        self.for_good = for_good


@dataclass(frozen=True)
class Alert:
    """One thing that is wrong (or right again). `id` is the same for the same thing, so that it is told once."""

    id: str
    title: str
    details: str = ""

    @property
    def text(self) -> str:
        return f"{self.title}\n{self.details}".strip()


class Channel(Protocol):
    """Somewhere that alerts are sent."""

    name: str

    def send(self, alert: Alert) -> None:
        """Deliver one alert. Raises NotDelivered."""


REFUSED = (400, 413, 422)
"""Statuses by which a webhook says that it is this body that it does not want."""


class Webhook:
    """A Slack-compatible webhook: POST of `{"text": …}`, repeated on connection errors, 429 and 5xx with growing pauses.

    One that asks for a longer pause gets the alert at the next tick: others are not held up meanwhile.
    """

    name = "webhook"

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings

    def send(self, alert: Alert) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        retry = Retry(
            total=self.settings.retries,
            backoff_factor=0.3,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
            respect_retry_after_header=False,
        )
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            try:
                body = {"text": alert.text, "id": alert.id}
                url = self.settings.webhook_url.get_secret_value()
                # What is told there besides the status is nobody's, and may take for ever.
                session.post(url, json=body, timeout=self.settings.timeout_seconds, stream=True).raise_for_status()
            except (requests.RequestException, ValueError) as error:
                # The address of a webhook is a secret; the error's text would tell it.
                status = getattr(getattr(error, "response", None), "status_code", None)
                told = f"webhook: {type(error).__name__}" + (f" {status}" if status else "")
                raise NotDelivered(told, status in REFUSED) from None


class Mail:
    """Mails through an SMTP server."""

    name = "mail"

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings

    def send(self, alert: Alert) -> None:
        settings = self.settings
        message = EmailMessage()
        message["Subject"] = f"recsys: {escaped(alert.title)[:120]}"
        message["From"], message["To"] = settings.email_from, ", ".join(settings.email_to)
        message.set_content(alert.text)
        try:
            with smtplib.SMTP(settings.smtp_host, settings.smtp_port, timeout=settings.timeout_seconds) as server:
                if settings.smtp_starttls:
                    server.starttls(context=ssl.create_default_context())
                if settings.smtp_user:
                    server.login(settings.smtp_user, settings.smtp_password.get_secret_value())
                server.send_message(message)
        except (OSError, smtplib.SMTPException) as error:
            raise NotDelivered(f"mail by {settings.smtp_host}:{settings.smtp_port}: {masked_text(str(error))}") from error


def channels(settings: AlertSettings) -> Iterator[Channel]:
    """The channels that the settings name."""
    if settings.webhook_url.get_secret_value():
        yield Webhook(settings)
    if settings.smtp_host and settings.email_to:
        yield Mail(settings)
