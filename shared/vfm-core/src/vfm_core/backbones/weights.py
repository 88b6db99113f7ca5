"""Reaching weights: the offline switch, the hub client's cache, and errors that a user can act on.

The three libraries fail in many ways when weights are absent, gated, damaged or of another model, after half a minute
of retries and with pages of traceback. Everything that opens a checkpoint runs inside :func:`reaching`, which answers
quickly and in one line.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vfm_core.backbones.local import find_weights
from vfm_core.errors import UserError

__all__ = ["is_offline", "reaching", "require_cached", "require_downloaded"]

_CONFIG_FILES = ("open_clip_config.json", "config.json", "preprocessor_config.json")
_REMEDY = (
    "put the files into the cache, give a local checkpoint (dir:PATH), use tiny:NAME (ships with tinyworld),"
    " or random:SPEC for untrained weights"
)
_ABSENT = "{} and there are no pretrained weights"
_OFFLINE, _UNREACHABLE = "offline mode is on", "the model hub cannot be reached"
_LOCK = threading.RLock()


def is_offline(offline: bool | None = None) -> bool:
    """Whether the network is off limits: the argument, else the hub client's own environment switches."""
    if offline is not None:
        return offline
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


@contextmanager
def reaching(
    what: str, *, offline: bool, local: Path | None, cache_dir: str | Path | None, hub: bool = True
) -> Iterator[bool]:
    """Load weights inside this block: no socket when offline, quick and readable failure always.

    Parameters
    ----------
    what : str
        The spec, for messages.
    offline : bool
        Never open a socket.
    local : Path or None
        The folder or file that is being read, None when weights come from the hub or its cache.
    cache_dir : str, Path or None
        Where the client's cache lies, None for its default.
    hub : bool
        Whether the hub is needed at all; a random model of a known name needs nothing.

    Yields
    ------
    bool
        Whether the block runs offline: asked for, local, or because the hub does not answer.

    Raises
    ------
    UserError
        In place of whatever the libraries raised; their error stays its cause.
    """
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    unreachable = hub and not offline and local is None and not _hub_answers(constants.ENDPOINT)
    quiet = offline or unreachable or local is not None
    root, silence = logging.getLogger(), logging.NullHandler()
    with _LOCK:
        before = constants.HF_HUB_OFFLINE
        # The client has no scoped switch, and neither timm nor open_clip passes local_files_only through.
        constants.HF_HUB_OFFLINE = before or quiet
        # open_clip logs to the root logger through logging.warning(), which would install a handler for good.
        root.addHandler(silence)
        try:
            yield quiet
        except UserError as error:
            if unreachable and error.what == _ABSENT.format(_OFFLINE):  # the library was only told to stay offline
                raise _missing(str(error.given), cache_dir, _UNREACHABLE) from error
            raise
        except (OSError, RuntimeError, ValueError, KeyError, ImportError, EOFError, pickle.UnpicklingError) as error:
            raise _explain(error, what, local, offline, cache_dir) from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # derives from Exception alone
                raise
            raise _explain(error, what, local, offline, cache_dir) from error
        finally:
            constants.HF_HUB_OFFLINE = before
            root.removeHandler(silence)


def require_cached(
    what: str, repo: str, names: Iterable[str], revision: str | None, cache_dir: str | Path | None
) -> None:
    """Refuse at once when none of these files of a hub repository is in the cache.

    timm and open_clip look for weights only after they have built the model, which takes seconds for a large one.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        if isinstance(try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision), str):
            return
    raise _missing(what if repo in what else f"{what} (repository {repo})", cache_dir)


def require_downloaded(what: str, url: str, cache_dir: str | Path | None) -> None:
    """Refuse at once when weights that live at a plain address were not downloaded before."""
    import torch

    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), "checkpoints")
    if not (folder / Path(urllib.parse.urlparse(url).path).name).is_file():
        raise _missing(f"{what} ({Path(url).name})", folder)


def _hub_answers(endpoint: str, timeout: float = 3.0) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, can be opened."""
    address = urllib.parse.urlparse(endpoint)
    host = address.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        address = urllib.parse.urlparse(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    answered = []

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=timeout).close()
            answered.append(True)
        except OSError:
            pass

    # Resolving a name can hang for much longer than the connection's own timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answered)


# ---------------------------------------------------------------------- errors
def _missing(what: str, cache_dir: str | Path | None, reason: str = _OFFLINE) -> UserError:
    from huggingface_hub import constants

    where = f"the cache {cache_dir or constants.HF_HUB_CACHE}"
    return UserError(_ABSENT.format(reason), where=where, given=what, remedy=_REMEDY)


def _explain(
    error: BaseException, what: str, local: Path | None, offline: bool, cache_dir: str | Path | None
) -> UserError:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, UserError):
            return link
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if isinstance(error, ImportError):
        name = error.name or str(error)
        extra = {"open_clip": "open-clip", "transformers": "transformers"}.get(name.split(".")[0])
        remedy = f"pip install 'vfm-core[{extra}]'" if extra else f"install {name}"
        return UserError("a package is missing", where=what, given=name, remedy=remedy)
    if local is not None:
        return _explain_local(error, what, local)
    if "GatedRepoError" in kinds:
        remedy = "accept the licence on the model's page and log in to the hub, or use a local copy (dir:PATH)"
        return UserError("these weights need a licence agreement", given=what, remedy=remedy)
    if "RepositoryNotFoundError" in kinds:
        remedy = "check the spelling, or log in if it is private"
        return UserError("no such model repository on the hub", given=what, remedy=remedy)
    if "RevisionNotFoundError" in kinds:
        return UserError("no such revision of this model", given=what, remedy="check the part after '@'")
    if kinds & {"LocalEntryNotFoundError", "TransportError", "ConnectionError", "TimeoutError", "URLError", "gaierror"}:
        return _missing(what, cache_dir, _OFFLINE if offline else _UNREACHABLE)
    if "EntryNotFoundError" in kinds:
        return UserError("the model repository lacks a needed file", given=what, remedy=_first_line(error))
    return UserError("cannot load the model", where=what, given=f"{type(error).__name__}: {_first_line(error)}")


def _explain_local(error: BaseException, what: str, local: Path) -> UserError:
    for name in _CONFIG_FILES if local.is_dir() else ():
        try:
            json.loads((local / name).read_text()) if (local / name).is_file() else None
        except ValueError as bad:
            return UserError("not valid JSON", where=local / name, given=bad, remedy="copy the file again")
    where = (find_weights(local) or local) if local.is_dir() else local
    text = _first_line(error)
    if any(part in str(error) for part in ("size mismatch", "Missing key", "Unexpected key")):
        remedy = "the weights belong to another architecture: check the model name or config.json"
        return UserError(f"weights do not fit {what}", where=where, given=text, remedy=remedy)
    if "weights_only" in str(error) or "Unpickling" in type(error).__name__:
        remedy = (
            "only plain state dicts are read: save it again with safetensors.torch.save_file(model.state_dict(), ...)"
        )
        return UserError("refused to unpickle arbitrary objects", where=where, given=text, remedy=remedy)
    given = f"{type(error).__name__}: {text}"
    return UserError(f"cannot load {what}", where=where, given=given, remedy="the file is damaged or of another model")


def _first_line(error: BaseException) -> str:
    """Return the telling line of a library's error, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Error(s) in loading state_dict") and len(lines) > 1:
        lines = lines[1:]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
