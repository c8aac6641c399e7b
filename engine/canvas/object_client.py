"""Objects under one prefix of a bucket: read, written on a condition, listed; and a store's errors in words.

A write names what it replaces, and is refused when something else is there by now. What was accepted is durable and is
what everyone reads next (S3, Google Cloud and Azure promise both). It does not know runs or arrays.
Source: HTTP If-None-Match and If-Match on PUT (RFC 9110, 13.1), as obstore's put modes.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from engine.core.errors import CanvasError

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta

PATIENCE_S = 60.0
"""How long an operation is tried again before the store counts as not answering."""
UNREACHABLE = (BaseError, NotImplementedError)
"""What obstore raises beside OSError; NotImplementedError is its word for a condition that a store does not know."""
Version = dict[str, str]
"""What identifies the content of an object at one moment (e_tag, version)."""
_METADATA_SERVICE = "169.254."
"""Where credentials are asked for when none are given."""


class _Lists(Protocol):
    """What is used of obstore, whose own annotations name types that are not installed."""

    def list_with_delimiter(self, store: ObjectStore, prefix: str | None) -> "ListResult[Sequence[ObjectMeta]]": ...
    def list(self, store: ObjectStore, prefix: str | None) -> "Iterable[Sequence[ObjectMeta]]": ...


_lists: _Lists = obstore


class OvertakenError(CanvasError):
    """Somebody else wrote the object since it was read."""


def connect(url: str) -> ObjectStore:
    """Return obstore's store for a URL; credentials, endpoint and region come from the environment.

    Raises: CanvasError when the URL or the environment lack what a store of this kind needs.
    """
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
    patience = {"retry_timeout": timedelta(seconds=PATIENCE_S), "max_retries": 1_000_000, "backoff": backoff}
    try:
        return from_url(url, retry_config=patience)  # type: ignore[call-overload]  # a TypedDict
    except (*UNREACHABLE, ValueError) as error:
        raise CanvasError(
            f"{url} must name a bucket, as in s3://bucket/prefix, and the environment how to reach it; {_brief(error)}."
        ) from error


class Objects:
    """The objects below a prefix. All raise CanvasError when the store refuses or does not answer."""

    def __init__(self, where: str, store: ObjectStore) -> None:
        self.where = where
        """URL of the prefix, for messages."""
        self.store = store

    def get(self, name: str) -> tuple[bytes, Version] | None:
        """Return an object and its version; None if it is not there."""
        try:
            found = obstore.get(self.store, name)
            return bytes(found.bytes()), _version(found.meta)
        except FileNotFoundError:
            return None
        except (*UNREACHABLE, OSError) as error:
            raise failed(self.where, error, f"{name} cannot be read") from error

    def put(self, name: str, data: bytes, replaces: Version | None) -> Version:
        """Write an object in place of the version it `replaces` (None: nothing may be there); return the new one.

        Raises: OvertakenError if something else is there.
        """
        mode = "create" if replaces is None else replaces
        try:
            return _version(obstore.put(self.store, name, data, mode=mode, use_multipart=False))  # type: ignore[arg-type]
        except (AlreadyExistsError, PreconditionError) as error:
            now = self.get(name)  # the refused one may be the second try of one whose answer was lost
            if now is not None and now[0] == data:
                return now[1]
            raise OvertakenError(f"{self.where}/{name} must be as it was read; another process wrote it.") from error
        except (*UNREACHABLE, OSError) as error:
            raise failed(self.where, error, f"{name} cannot be written") from error

    def children(self, folder: str = "") -> list[str]:
        """Return the names directly below a folder, folders among them."""
        try:
            found = _lists.list_with_delimiter(self.store, folder or None)
        except (*UNREACHABLE, OSError) as error:
            raise failed(self.where, error, "the objects cannot be listed") from error
        paths = [*found["common_prefixes"], *(o["path"] for o in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def remove(self, folder: str) -> None:
        """Remove all objects below a folder."""
        try:
            for some in _lists.list(self.store, folder):
                obstore.delete(self.store, [o["path"] for o in some])
        except (*UNREACHABLE, OSError) as error:
            raise failed(self.where, error, f"{folder} cannot be removed") from error


def _version(meta: object) -> Version:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}  # type: ignore[index]


def _brief(error: Exception) -> str:
    """Return what a store said, without the bodies and headers that follow: they may repeat a credential."""
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    said = str(error).splitlines()[0].partition("<")[0].strip(" :")[:300]
    return f"{said} ({code[1]})" if code else said


def failed(where: str, error: Exception, what: str) -> CanvasError:
    """Say what a failed operation means to the run and what to do."""
    said = _brief(error)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _METADATA_SERVICE in said:
        return CanvasError(
            f"{where}: {what}; the credentials must allow to read, write, list and delete there, and the store did "
            f"not take them: {said}. Set those of your cloud in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, for instance) or give the machine a role, then repeat the command to continue."
        )
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in said:
        return CanvasError(
            f"{where}: {what}; the bucket must be there: {said}. Make it, or correct canvas.store (and "
            "AWS_ENDPOINT_URL)."
        )
    if isinstance(error, NotSupportedError | NotImplementedError):
        return CanvasError(
            f"{where}: {what}; the store must know conditional writes (If-None-Match, If-Match): {said}. Use another "
            "store, or a folder (file:///…)."
        )
    return CanvasError(
        f"{where}: {what}; the store must answer within {PATIENCE_S:g} s: {said}. Check the network, AWS_ENDPOINT_URL "
        "and AWS_ALLOW_HTTP (true for http://). Nothing committed is lost: repeat the command to continue."
    )
