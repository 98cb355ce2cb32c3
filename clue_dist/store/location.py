"""Where a store lies: in a folder, or behind a URL that TensorStore reads.

TensorStore finds credentials by itself. It does not take the server and the region of S3 from the
environment: this module reads the usual AWS variables and hands them over.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from clue_dist.errors import ServerError, StoreError
from clue_dist.files import PASSING, expand_home, require_utf8_path

SCHEMES = ("s3", "gs", "http", "https")
# Limit of a file that is read whole. The manifest of a billion cells is smaller.
MAX_FILE_BYTES = 2**32
# A request that fails is repeated for half a minute in all; then the error is raised.
_RETRY_POLICY = {"max_retries": 8, "initial_delay": "250ms", "max_delay": "8s"}
RETRIES = {f"{driver}_request_retries": _RETRY_POLICY for driver in ("s3", "gcs", "http")}

_SET_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "for gs:// GOOGLE_APPLICATION_CREDENTIALS"
)
_CORRECT_URL = "correct the URL or AWS_ENDPOINT_URL"
_ACCESS_REFUSED = (
    "the server refuses access to the store",
    f"correct the URL, or {_SET_CREDENTIALS}",
)
# A part of TensorStore's message, and what it means: the error, and the fix.
_SERVER_ERRORS = {
    "PERMISSION_DENIED": _ACCESS_REFUSED,
    "UNAUTHENTICATED": _ACCESS_REFUSED,
    "Failed to get credentials": ("no credentials for the store", _SET_CREDENTIALS),
    "retry attempts failed": (
        "the server of the store cannot be reached, or fails",
        "check the URL, AWS_ENDPOINT_URL and the server; once it answers, type the same command "
        "again",
    ),
}


@dataclass(frozen=True)
class RemoteLocation:
    """A URL; `remote / "a/b"` is the URL of what lies below it."""

    url: str  # without a slash at its end

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.url.rpartition("/")[2]

    def __truediv__(self, path: str) -> RemoteLocation:
        return RemoteLocation(f"{self.url}/{path}")


Location = Path | RemoteLocation


def parse_location(text: str | Location) -> Location:
    """Read a folder or a URL as a person writes it.

    Raises:
        StoreError: the URL has an unknown scheme, or names no bucket or host; or `~NAME` is no
            home folder.
    """
    if not isinstance(text, str):
        return text
    if "://" not in text:
        try:
            require_utf8_path(text)
            return Path(expand_home(text))
        except ValueError as error:
            raise StoreError("a path that cannot be used", where=text, got=error) from None
    scheme, _, rest = text.partition("://")
    if scheme.startswith("http") and rest.split("/")[0].endswith(".amazonaws.com"):
        raise StoreError(
            "Amazon takes the + in a store's paths for a space",
            where=text,
            fix="write s3://BUCKET/PATH; a public bucket needs no keys",
        )
    if scheme not in SCHEMES or not rest.strip("/") or "?" in rest or "#" in rest:
        raise StoreError(
            "a store cannot lie there",
            where=text,
            expected=f"a folder, or {', '.join(f'{s}://' for s in SCHEMES)} and a path",
            fix="correct the path",
        )
    return RemoteLocation(text.rstrip("/"))


def open_kvstore(root: Location, folder: str = "") -> dict[str, Any]:
    """Return TensorStore's key-value spec of a store, or of a folder in it."""
    if isinstance(root, RemoteLocation):
        return _specify_remote(root / folder if folder else root)
    # TensorStore refuses a path with `.` or `..` in it. The system resolves them, links included.
    location = Path(os.path.realpath(root), folder)
    return {"driver": "file", "path": f"{location}/"}


def require_plain_files(
    root: Location, name: str | None = None, max_bytes: int | None = None
) -> None:
    """Check that a store in a folder holds regular files and folders alone.

    A link may lead out of the store, and reading a pipe may never end. What is missing passes this
    check, and so does everything behind a URL.

    Args:
        root: where the store lies.
        name: one file of the store, to check it and the folders on its path; None: check the whole
            folder.
        max_bytes: limit of the size of that file.

    Raises:
        StoreError: something is neither file nor folder, is too large, or cannot be looked at.
    """
    if isinstance(root, RemoteLocation):
        return
    file_bytes = 0
    try:
        if name is None:
            special = next(_find_special_files(root), None)
        else:
            special = _find_special_part(root, name)
            if max_bytes is not None and (root / name).is_file():
                file_bytes = (root / name).lstat().st_size
    except (OSError, ValueError) as error:
        raise translate_read_error(
            error, root, "the store's folder cannot be read", where=root, fix="correct the path"
        ) from None
    if special is not None:
        raise StoreError(
            "a store holds files and folders alone",
            where=special,
            got=_describe_special(special),
            fix="put a copy of what it leads to in its place, or convert again",
        )
    if max_bytes is not None:
        _require_size(root, str(name), file_bytes, max_bytes)


def _require_size(root: Location, name: str, file_bytes: int, max_bytes: int) -> None:
    """Refuse a file that is larger than it can be."""
    if file_bytes > max_bytes:
        raise StoreError(
            "a file of the store is larger than it can be",
            where=f"{root}/{name}",
            got=f"{file_bytes} bytes",
            expected=f"{max_bytes} at most",
        )


def _find_special_files(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder that is neither a regular file nor a folder."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _find_special_files(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _find_special_part(root: Path, name: str) -> Path | None:
    """Return the first part of a file's path that is no folder, and no file either."""
    path = root
    try:
        for part in name.split("/"):
            path /= part
            mode = path.lstat().st_mode
            is_folder = stat.S_ISDIR(mode) and path != root / name  # the last part is the file
            if not (is_folder or stat.S_ISREG(mode)):
                return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _describe_special(path: Path) -> str:
    """Say what it is that is no regular file."""
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a pipe, socket or device"


def _specify_remote(location: RemoteLocation) -> dict[str, Any]:
    """Return TensorStore's key-value spec of a URL."""
    scheme, _, rest = location.url.partition("://")
    host, _, path = rest.partition("/")  # the bucket, where the URL is that of a bucket
    path = f"{path}/" if path else ""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": host, "path": path}
    if scheme == "s3":
        return {"driver": "s3", "bucket": host, "path": path, **_read_aws_settings(os.environ)}
    return {"driver": "http", "base_url": f"{scheme}://{host}", "path": f"/{path}"}


def _read_aws_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the server, region and source of credentials that AWS variables name."""
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    # Without keys in the environment TensorStore looks for files, then for the role of the machine.
    # With them, naming the source spares it the search, which logs each file that is missing.
    in_environment = bool(environment.get("AWS_ACCESS_KEY_ID"))
    settings = {
        "endpoint": endpoint and endpoint.rstrip("/"),
        "aws_region": environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
        "aws_credentials": {"type": "environment"} if in_environment else None,
    }
    return {name: value for name, value in settings.items() if value}


def read_file(
    root: Location, name: str, optional: bool = False, max_bytes: int = MAX_FILE_BYTES
) -> bytes | None:
    """Read one file of a store.

    Args:
        root: where the store lies.
        name: the file's path inside the store.
        optional: whether a store may lack the file. A server that does not let us list a bucket
            answers "permission denied" for a missing file; an optional one then counts as missing.
        max_bytes: limit of the file's size. In a folder it is checked before the file is read.

    Returns:
        The file's bytes; None where there is no such file.

    Raises:
        StoreError: the file or its server cannot be read, the file is a link, or there is no such
            bucket.
    """
    require_plain_files(root, name, max_bytes)
    try:
        store = _open(root)
        found = store.read(name).result()
        if found.state == "missing":
            _require_bucket(root, store, name)
            return None
    except (ValueError, OSError) as error:
        if optional and isinstance(root, RemoteLocation) and "PERMISSION_DENIED" in str(error):
            return None
        raise translate_read_error(
            error, root, "a file of the store cannot be read", where=root / name
        ) from None
    _require_size(root, name, len(found.value), max_bytes)
    return bytes(found.value)


def list_files(root: Location) -> list[str] | None:
    """List the paths of all files of a store, links among them.

    Returns:
        Paths inside the store; None where the server keeps no list (http).

    Raises:
        StoreError: the server cannot be read.
    """
    if isinstance(root, Path):
        return [
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if not path.is_dir() or path.is_symlink()
        ]
    if root.url.startswith("http"):
        return None
    try:
        return [key.decode() for key in _open(root).list().result()]
    except (ValueError, OSError) as error:
        raise translate_read_error(
            error, root, "the files of the store cannot be listed", where=root
        ) from None


def translate_read_error(
    error: Exception, root: Location, what: str, where: object, fix: str | None = None
) -> StoreError:
    """Make one of our errors of one that TensorStore or the system raised.

    Args:
        error: what was raised.
        root: where the store lies.
        what: what went wrong, unless the error shows that a server is to blame.
        where: the file, array or blocks that were read.
        fix: what a person can do, unless a server is to blame.

    Returns:
        A ServerError where a server, or a file server, is down or refuses; else a StoreError, for
        data that are missing or damaged.
    """
    number = getattr(error, "errno", None)
    message = _shorten(str(error)) if number is None else str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore writes it
    if (int(code[1]) if code else number) in PASSING:
        return ServerError(
            "the file system of the store fails",
            where=where,
            got=message,
            fix="look at the file server; once it answers, type the same command again",
        )
    if isinstance(root, RemoteLocation):
        for mark, (server_error, server_fix) in _SERVER_ERRORS.items():
            if mark in message:
                return ServerError(server_error, where=where, got=message, fix=server_fix)
        fix = fix or _CORRECT_URL
    return StoreError(what, where=where, got=message, fix=fix)


def _open(root: Location) -> Any:
    """Open a store as TensorStore's key-value store."""
    return ts.KvStore.open(open_kvstore(root), context=ts.Context(RETRIES)).result()


def _require_bucket(root: Location, store: Any, name: str) -> None:
    """Raise an error where not the file `name` is missing, but its bucket.

    S3 and GCS answer a read the same way in both cases; listing that one name tells them apart.
    """
    if not isinstance(root, RemoteLocation) or root.url.startswith("http"):
        return
    try:
        store.list(ts.KvStore.KeyRange(name, name + "\0")).result()
    except (ValueError, OSError) as error:
        if "NOT_FOUND" in str(error):
            raise StoreError(
                "no such bucket", where=root, got=_shorten(str(error)), fix=_CORRECT_URL
            ) from None
        # Credentials may allow reading but not listing. The bucket then exists.
        if "PERMISSION_DENIED" not in str(error):
            raise


def _shorten(message: str) -> str:
    """Cut off the request that TensorStore's message repeats; keep the server's status."""
    status = re.search(r"(?:http_response_code='|HTTP code )(\d+)", message)
    text = message.split("[")[0].strip() + (f" (HTTP {status[1]})" if status else "")
    return json.dumps(text)[1:-1]  # control characters escaped
