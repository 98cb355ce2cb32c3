"""Where a store lies: a folder, or a URL that TensorStore reads: s3://, gs://, http://, https://.

TensorStore finds credentials by itself, but takes neither the server nor the region of S3 from the environment; these
go from the usual AWS variables into the spec.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from clue_dist.errors import ServerError, StoreError
from clue_dist.files import PASSING

SCHEMES = ("s3", "gs", "http", "https")
MAX_FILE_BYTES = (
    2**32
)  # bytes of a file that is read whole: the manifest of a billion cells is smaller
_EIGHT_TIMES = {
    "max_retries": 8,
    "initial_delay": "250ms",
    "max_delay": "8s",
}  # half a minute in all, then the error
RETRIES = {f"{driver}_request_retries": _EIGHT_TIMES for driver in ("s3", "gcs", "http")}

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for gs:// GOOGLE_APPLICATION_CREDENTIALS"
_MEND = "mend the URL or AWS_ENDPOINT_URL"
_SERVER_SAYS = {  # a part of TensorStore's message -> what to tell, how to mend it
    "PERMISSION_DENIED": (
        "the server refuses access to the store",
        f"mend the URL, or set {_KEYS}",
    ),
    "UNAUTHENTICATED": ("the server refuses access to the store", f"mend the URL, or set {_KEYS}"),
    "Failed to get credentials": ("no credentials for the store", f"set {_KEYS}"),
    "retry attempts failed": (
        "the server of the store cannot be reached, or fails",
        "check the URL, AWS_ENDPOINT_URL and the server; once it answers, type the same command again",
    ),
}


@dataclass(frozen=True)
class RemoteLocation:
    """A URL, without a slash at its end; `remote / "a/b"` lies below it."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, path: str) -> RemoteLocation:
        return RemoteLocation(f"{self.url}/{path}")


Location = Path | RemoteLocation


def parse_location(where: str | Location) -> Location:
    """What a person typed -> a folder or a URL.

    Raises:
        StoreError: a URL of a kind that is not known, or without a bucket or host.
    """
    if not isinstance(where, str) or "://" not in where:
        return Path(where) if isinstance(where, str) else where
    scheme, _, rest = where.partition("://")
    if scheme.startswith("http") and rest.split("/")[0].endswith(".amazonaws.com"):
        what, fix = (
            "Amazon takes the + in a store's paths for a space",
            "s3://BUCKET/PATH; a public one needs no keys",
        )
        raise StoreError(what, where=where, fix=fix)
    if scheme not in SCHEMES or not rest.strip("/") or "?" in rest or "#" in rest:
        expected = f"a folder, or {', '.join(f'{s}://' for s in SCHEMES)} and a path"
        raise StoreError(
            "a store cannot lie there", where=where, expected=expected, fix="mend the path"
        )
    return RemoteLocation(where.rstrip("/"))


def open_kvstore(root: Location, folder: str = "") -> dict[str, Any]:
    """TensorStore's spec of a store, or of a folder in it."""
    place = root / folder if folder else root
    return (
        _remote(place)
        if isinstance(place, RemoteLocation)
        else {"driver": "file", "path": f"{place}/"}
    )


def require_plain_files(root: Location, name: str | None = None, most: int | None = None) -> None:
    """Everything in a store's folder, or one file of it and the folders on the way, is a file or a folder: links lead
    elsewhere, and to read a pipe may never end. What is not there is not looked at, nor what a server holds.

    most: bytes of that file.

    Raises:
        StoreError: it is something else, is larger, or cannot be looked at.
    """
    if isinstance(root, RemoteLocation):
        return
    try:
        strange = next(_strange(root), None) if name is None else _strange_on_the_way(root, name)
        size = (
            (root / name).lstat().st_size
            if name and most is not None and (root / name).is_file()
            else 0
        )
    except (OSError, ValueError) as error:
        raise translate_read_error(
            error, root, "the store's folder cannot be read", where=root, fix="mend the path"
        ) from None
    if strange is not None:
        kind = (
            "a link"
            if strange.is_symlink()
            else "a folder"
            if strange.is_dir()
            else "a pipe, socket or device"
        )
        what, fix = (
            "a store holds files and folders alone",
            "put what it should be in its place, or convert again",
        )
        raise StoreError(what, where=strange, got=kind, fix=fix)
    if most is not None and size > most:
        what = "a file of the store is larger than it can be"
        raise StoreError(
            what, where=f"{root}/{name}", got=f"{size} bytes", expected=f"{most} at most"
        )


def _strange(folder: Path) -> Iterator[Path]:
    """What lies in a folder and is neither file nor folder."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _strange(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _strange_on_the_way(root: Path, name: str) -> Path | None:
    """The first part of a file's path that is neither a folder nor, at its end, a file."""
    path = root
    try:
        for part in name.split("/"):
            path /= part
            mode = path.lstat().st_mode
            if not (
                stat.S_ISREG(mode)
                if path == root / name
                else stat.S_ISDIR(mode) or stat.S_ISREG(mode)
            ):
                return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _remote(place: RemoteLocation) -> dict[str, Any]:
    scheme, _, rest = place.url.partition("://")
    first, _, path = rest.partition("/")
    path = f"{path}/" if path else ""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": first, "path": path}
    if scheme == "s3":
        return {"driver": "s3", "bucket": first, "path": path, **_aws(os.environ)}
    return {"driver": "http", "base_url": f"{scheme}://{first}", "path": f"/{path}"}


def _aws(env: Any) -> dict[str, Any]:
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    # Otherwise: files, the instance's role, or none. Named, as looking for these files is loud where there are none.
    keys = {"type": "environment"} if env.get("AWS_ACCESS_KEY_ID") else None
    told = {
        "endpoint": endpoint and endpoint.rstrip("/"),
        "aws_region": region,
        "aws_credentials": keys,
    }
    return {name: value for name, value in told.items() if value}


def read_file(
    root: Location, name: str, optional: bool = False, most: int = MAX_FILE_BYTES
) -> bytes | None:
    """The bytes of one file of a store; None where there is none.

    optional: a store need not have it. Who may not list the objects of a bucket is refused what is not there. most:
    bytes that it can have, in a folder.

    Raises:
        StoreError: the file, or its server, cannot be read; it is a link; there is no such bucket.
    """
    require_plain_files(root, name, most)
    try:
        store = _open(root)
        got = store.read(name).result()
        if got.state == "missing":
            _require_bucket(root, store, name)
            return None
    except (ValueError, OSError) as error:
        if optional and isinstance(root, RemoteLocation) and "PERMISSION_DENIED" in str(error):
            return None
        raise translate_read_error(
            error, root, "a file of the store cannot be read", where=root / name
        ) from None
    return bytes(got.value)


def list_files(root: Location) -> list[str] | None:
    """Names of all files of a store, links among them; None where the server has no list (http).

    Raises:
        StoreError: the server cannot be read.
    """
    if isinstance(root, Path):
        return [
            p.relative_to(root).as_posix()
            for p in root.rglob("*")
            if not p.is_dir() or p.is_symlink()
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
    """What TensorStore or the system met, as an error; a server that is down or refuses, a file server too, is told
    from data that are damaged."""
    number = getattr(error, "errno", None)
    got = _plain(str(error)) if number is None else str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if (int(code[1]) if code else number) in PASSING:
        fix = "look at the file server; once it answers, type the same command again"
        return ServerError("the file system of the store fails", where=where, got=got, fix=fix)
    if isinstance(root, RemoteLocation):
        for mark, (told, mend) in _SERVER_SAYS.items():
            if mark in got:
                return ServerError(told, where=where, got=got, fix=mend)
        fix = fix or _MEND
    return StoreError(what, where=where, got=got, fix=fix)


def _open(root: Location) -> Any:
    return ts.KvStore.open(open_kvstore(root), context=ts.Context(RETRIES)).result()


def _require_bucket(root: Location, store: Any, name: str) -> None:
    """S3 and GCS say the same of a missing object and of a missing bucket; a list of one name tells them apart."""
    if not isinstance(root, RemoteLocation) or root.url.startswith("http"):
        return
    try:
        store.list(ts.KvStore.KeyRange(name, name + "\0")).result()
    except (ValueError, OSError) as error:
        if "NOT_FOUND" in str(error):
            raise StoreError(
                "no such bucket", where=root, got=_plain(str(error)), fix=_MEND
            ) from None
        if "PERMISSION_DENIED" not in str(
            error
        ):  # who may read objects need not be allowed to list them
            raise


def _plain(message: str) -> str:
    """TensorStore's message without the request it repeats, but with the server's status."""
    status = re.search(r"(?:http_response_code='|HTTP code )(\d+)", message)
    text = message.split("[")[0].strip() + (f" (HTTP {status[1]})" if status else "")
    return json.dumps(text)[1:-1]
