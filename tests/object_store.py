"""A real S3 server on loopback, what it was asked for, and caches in it."""

import contextlib
import logging
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import boto3
from moto.server import ThreadedMotoServer


@dataclass(kw_only=True)
class ObjectStore:
    """The server's address and its log of requests, as (method, key)."""

    endpoint: str
    server: ThreadedMotoServer
    requests: list[tuple[str, str]] = field(default_factory=list)
    bucket: str = field(default_factory=lambda: f"caches-{secrets.token_hex(4)}")  # servers of a process share them all

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def environment(self) -> dict[str, str]:
        """What a process needs to find the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def client(self) -> "boto3.client":
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")

    def files(self, name: str) -> dict[str, bytes]:
        """Every object below a prefix with its bytes."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{name}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {
            key.removeprefix(f"{name}/"): client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys
        }

    def put(self, key: str, data: bytes) -> None:
        self.client().put_object(Bucket=self.bucket, Key=key, Body=data)

    def fetched(self, pattern: str) -> Counter[str]:
        """How often each object whose key matches was read since the log was last cleared."""
        return Counter(key for method, key in self.requests if method == "GET" and re.search(pattern, key))


class _RequestLog(logging.Handler):
    def __init__(self, store: ObjectStore) -> None:
        super().__init__()
        self._store = store

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.search(r"(GET|PUT|HEAD|DELETE|POST) (\S+) HTTP", record.getMessage()):
            path = unquote(match[2]).partition("?")[0]
            self._store.requests.append((match[1], path.removeprefix(f"/{self._store.bucket}/")))


@contextlib.contextmanager
def serve_objects() -> Iterator[ObjectStore]:
    """A server with one empty bucket; its address and credentials are in the environment meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = ObjectStore(endpoint=f"http://{host}:{port}", server=server)
    log = logging.getLogger("werkzeug")
    handler = _RequestLog(store)
    old_environment, old_level = dict(os.environ), log.level
    os.environ.update(store.environment())
    log.setLevel(logging.INFO)
    log.propagate = False  # or every failure comes with hundreds of lines
    log.addHandler(handler)
    try:
        store.client().create_bucket(Bucket=store.bucket)
        yield store
    finally:
        log.removeHandler(handler)
        log.setLevel(old_level)
        log.propagate = True
        os.environ.clear()
        os.environ.update(old_environment)
        with contextlib.suppress(Exception):  # a test may have stopped it already
            server.stop()
