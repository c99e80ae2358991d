"""An S3 server on loopback, as a process of its own, and servers that refuse."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import boto3

from storage import object_store
from tests.parts import free_port

BUCKET = "checkpoints"
SECRET_KEY = "an-s3-secret-that-stands-nowhere"


@dataclass(frozen=True)
class ObjectServer:
    """An S3 server with one bucket."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> Mapping[str, str]:
        """What boto3 reads to find the server."""
        return variables(self.port)

    def names(self) -> list[str]:
        """Of all objects."""
        return [entry.key for entry in self._bucket().objects.all()]

    def read(self, name: str) -> bytes:
        """An object's content."""
        return bytes(self._bucket().Object(name).get()["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        """Put an object there."""
        self._bucket().put_object(Key=name, Body=content)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._bucket().Object(name).delete()

    def _bucket(self) -> "boto3.resources.base.ServiceResource":
        s3 = boto3.resource(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id="test",
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        return s3.Bucket(BUCKET)


def variables(port: int) -> dict[str, str]:
    """boto3's, for a server on this port."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def running_server() -> Iterator[ObjectServer]:
    """A server with an empty bucket, until the block's end."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(port)],
        env={**os.environ, **variables(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = ObjectServer(port, process)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                server._bucket().create()
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


_SERVE = (
    "import sys; from moto.moto_server.werkzeug_app import DomainDispatcherApplication as D, "
    "create_backend_app as c; from werkzeug.serving import run_simple as r; "
    "r('127.0.0.1', int(sys.argv[1]), D(c), threaded=True)"
)


@contextlib.contextmanager
def refusing_server(status: int) -> Iterator[int]:
    """The port of a server that answers every request with this status."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_DELETE = _refuse  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def forget_clients() -> None:
    """The next store makes a client anew, with the environment of then."""
    object_store._artifact_store.cache_clear()
