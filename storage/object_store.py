"""An object store for checkpoints, through Optuna's artifact stores: s3://BUCKET/PREFIX.

Credentials, region and endpoint are boto3's own business (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
...): they are read nowhere here and stand in no message.
"""

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from storage.errors import StorageError

if TYPE_CHECKING:
    from optuna.artifacts import Boto3ArtifactStore

_SCHEME = "s3://"
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 20
"""Of silence, after which a request is tried once more and then given up."""
_TRIES = 2


class ObjectStoreError(OSError):
    """The store can't be reached or refuses; one line, without what the store itself says."""


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """Objects by name below a prefix of a bucket. ObjectStoreError from any method."""

    bucket: str
    prefix: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", self.bucket):
            raise StorageError("HPO_CHECKPOINTS names no bucket: give s3://BUCKET/PREFIX")
        if importlib.util.find_spec("boto3") is None:
            raise StorageError("checkpoints in S3 need boto3: pip install 'hpo-vision[s3]'")

    @classmethod
    def of(cls, url: str) -> Self:
        """The store of a URL. Raises StorageError if there is no such one, or boto3 is missing."""
        bucket, _, prefix = url.removeprefix(_SCHEME).partition("/")
        return cls(bucket=bucket, prefix=prefix.strip("/"))

    @property
    def name(self) -> str:
        """For people."""
        return f"{_SCHEME}{self.bucket}/{self.prefix}"

    def read(self, name: str, *, most_bytes: int) -> bytes | None:
        """The first `most_bytes` of the object; None if there is none."""
        from optuna.artifacts.exceptions import ArtifactNotFound

        with self._errors():
            try:
                with contextlib.closing(self._artifacts.open_reader(self._key(name))) as reader:
                    return reader.read(most_bytes)
            except ArtifactNotFound:
                return None

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing: an object store knows no half objects."""
        with self._errors():
            self._artifacts.write(self._key(name), io.BytesIO(content))

    def remove(self, name: str) -> None:
        """Also one that isn't there."""
        from optuna.artifacts.exceptions import ArtifactNotFound

        with self._errors(), contextlib.suppress(ArtifactNotFound):
            self._artifacts.remove(self._key(name))

    @property
    def _artifacts(self) -> "Boto3ArtifactStore":
        return _artifact_store(self.bucket)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError, HTTPClientError, ValueError) as error:
            raise ObjectStoreError(f"{self.name}: {_reason(error)}") from None


@functools.cache
def _artifact_store(bucket: str) -> "Boto3ArtifactStore":
    """One client a process: making one takes a tenth of a second."""
    import boto3
    from botocore.config import Config
    from optuna.artifacts import Boto3ArtifactStore

    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_ANSWER_SECONDS,
        retries={"mode": "standard", "total_max_attempts": _TRIES},
        # our checkpoints have a checksum; other makers' stores don't know all of Amazon's
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Boto3ArtifactStore(bucket, boto3.client("s3", config=config))


def _reason(error: BaseException) -> str:
    """The store's code, or the kind of the error: what it says beside may hold a key's name."""
    cause: BaseException | None = error
    while cause is not None:
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = re.sub(r"\W+", " ", str(answer.get("Error", {}).get("Code")))[:80]
            return f"it answers {status}, {code}"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
