"""Hypercorn's settings as keys of ``http_options``: which there are, what they may be, what the defaults are here."""

from __future__ import annotations

import difflib
import logging
import ssl
from typing import TYPE_CHECKING, Any

from engine.config import HTTPOptions
from engine.errors import InvalidArgument

if TYPE_CHECKING:
    from hypercorn.config import Config

__all__ = ["build_config", "check", "tls_context"]

# Settings of hypercorn that the engine decides, and what to use instead.
_DECIDED_HERE = {
    "application_path": "the application is the engine's ingress",
    "bind": "use host and port",
    "daemon": "the engine owns its workers",
    "debug": "use debug=True, which is not hypercorn's",
    "graceful_timeout": "requests in flight end within the engine's own drain",
    "group": "the engine runs as the user who created it",
    "insecure_bind": "one engine serves one address",
    "logger_class": "the log goes to the logger 'engine.http'",
    "max_requests": "the engine owns its workers",
    "max_requests_jitter": "the engine owns its workers",
    "pid_path": "the engine owns its workers",
    "quic_bind": "HTTP/3 is not served yet",
    "umask": "use host and port",
    "use_reloader": "the engine owns its workers",
    "user": "the engine runs as the user who created it",
    "worker_class": "the engine owns its workers",
    "wsgi_max_body_size": "use max_body_bytes",
}

_DEFAULTS: dict[str, Any] = {
    # hypercorn's 5 s closes under the nose of clients and load balancers that wait for 60 s
    "keep_alive_timeout": 75.0,
    # a busy client would otherwise reconnect after every 1,000 requests
    "keep_alive_max_requests": 2**62,
    # a burst of connections must wait, not be reset
    "backlog": 1024,
    "include_server_header": False,
    "accesslog": None,
}

_CLASSES: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("True or False", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    list: ("a list", (list, tuple)),
}


def check(options: HTTPOptions) -> None:
    """Check every server setting.

    Raises:
        InvalidArgument: A setting is unknown, decided by the engine, of the wrong type, or names an unusable file.
    """
    if options.server_options:
        tls_context(build_config(options))


def build_config(options: HTTPOptions) -> Config:
    """Make hypercorn's configuration.

    Raises:
        InvalidArgument: A setting is unknown, decided by the engine, or of the wrong type.
    """
    from hypercorn.config import Config

    config = Config()
    config.errorlog = logging.getLogger("engine.http")
    for name, value in {**_DEFAULTS, **options.server_options}.items():
        _check_setting(Config, name, value)
        setattr(config, name, value)
    if (config.certfile is None) != (config.keyfile is None):
        missing = "keyfile" if config.keyfile is None else "certfile"
        raise InvalidArgument(f"http_options: TLS needs certfile and keyfile; {missing} is missing")
    return config


def tls_context(config: Config) -> ssl.SSLContext | None:
    """Make the TLS context, or None where none is configured.

    Raises:
        InvalidArgument: A file cannot be read or used, or the ciphers are unknown.
    """
    try:
        return config.create_ssl_context()
    except (OSError, ValueError, TypeError) as error:  # ssl.SSLError is an OSError
        given = {name: getattr(config, name) for name in ("certfile", "keyfile", "ca_certs", "ciphers")}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise InvalidArgument(f"http_options: TLS cannot be set up with {shown}: {error}") from error


def _check_setting(config: type[Config], name: str, value: Any) -> None:
    reason = _DECIDED_HERE.get(name)
    if reason is not None:
        raise InvalidArgument(f"http_options: hypercorn's {name!r} cannot be set: {reason}")
    known = _settings(config)
    if name not in known:
        fields = [field for field in HTTPOptions.__dataclass_fields__ if field != "server_options"]
        near = difflib.get_close_matches(name, [*fields, *known], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; hypercorn's are {', '.join(sorted(known))}"
        raise InvalidArgument(f"http_options: neither the engine nor hypercorn has a setting {name!r}{hint}")
    described = _CLASSES.get(type(known[name]))
    if described is not None:
        allowed, classes = described
        if not isinstance(value, classes) or (isinstance(value, bool) and bool not in classes):
            raise InvalidArgument(f"http_options: {name} must be {allowed}, not {value!r}")


def _settings(config: type[Config]) -> dict[str, Any]:
    """The settings of a hypercorn that may be newer than this code, with their defaults."""
    found: dict[str, Any] = {}
    for name in [*config.__annotations__, *vars(config)]:
        value = getattr(config, name, None)
        if not name.startswith("_") and not callable(value) and name not in _DECIDED_HERE and name != "log":
            found[name] = "" if isinstance(value, property) and name == "root_path" else value
    return {name: value for name, value in found.items() if not isinstance(value, property)}
