"""An S3 server on this machine: that of moto, behind a gate by which a test can break it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
}


@dataclass
class Gate:
    """A WSGI application in front of moto."""

    app: Any
    # Answers to the next requests, statuses or "cut"; then moto answers again.
    fail: list[str] = field(default_factory=list)
    always: str | None = None  # the answer to every request
    requests: list[str] = field(default_factory=list)  # method and path of each request so far

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        how = self.always or (self.fail.pop(0) if self.fail else None)
        if how is None:
            return self.app(environ, start)
        if how == "cut":  # the connection ends in the middle of the body
            answer: list[Any] = []
            body = b"".join(self.app(environ, lambda *given: answer.extend(given)))
            start(*answer)
            return [body[: len(body) // 2]]
        start(f"{how} No", [("Content-Length", "0")])
        return [b""]


@dataclass
class S3:
    """A running server with one bucket, `cells`."""

    url: str
    gate: Gate
    client: Any  # that of boto3

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process finds this server."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    def upload(self, folder: Path, key: str, acl: str = "private") -> str:
        """Copy a folder's files below `key`; return its s3:// URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                name = f"{key}/{path.relative_to(folder).as_posix()}"
                self.client.put_object(Bucket="cells", Key=name, Body=path.read_bytes(), ACL=acl)
        return f"s3://cells/{key}"

    def get(self, key: str) -> bytes:
        """Read an object."""
        return bytes(self.client.get_object(Bucket="cells", Key=key)["Body"].read())

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket="cells", Key=key, Body=content)


@contextmanager
def serve() -> Iterator[S3]:
    """Run a server for the length of the block, on a free port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="s3", daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "region_name": "us-east-1",
    }
    client = boto3.client("s3", endpoint_url=url, **keys)
    # moto keeps its state in this process: forget that of an earlier server.
    urlopen(Request(f"{url}/moto-api/reset", method="POST")).close()
    client.create_bucket(Bucket="cells")
    try:
        yield S3(url, gate, client)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
