"""The last states of trainings whose models are wanted after their trials have ended.

    root/STUDY_KEY/results/TRIAL_NUMBER-TOKEN.ckpt

A trial's own checkpoints go when it ends. What a lease's holder keeps here bears the lease's token,
so that an attempt that has lost its lease replaces nothing.
"""

from storage.checkpoints import checkpoint_root, checkpoint_url, read_file, seal, unseal, write_file
from storage.object_store import ObjectStore

_LARGEST_BYTES = 64 * 2**30


class KeptStates:
    """The kept states of one study, in the place that HPO_CHECKPOINTS names."""

    def __init__(self, study_key: int) -> None:
        """Raises StorageError if HPO_CHECKPOINTS names no place."""
        url = checkpoint_url()
        self._store = None if url is None else ObjectStore.of(url)
        self._folder = None if url is not None else checkpoint_root() / f"{study_key:d}" / "results"
        self._prefix = f"{study_key:d}/results"

    def write(self, trial_number: int, token: int, payload: bytes) -> None:
        """Keep the state; all of it or nothing. Raises OSError."""
        name = _name(trial_number, token)
        if self._store is not None:
            self._store.write(f"{self._prefix}/{name}", seal(payload))
            return
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / name, payload)

    def read(self, trial_number: int, token: int) -> bytes | None:
        """The state, None if there is none that was written whole. Raises OSError."""
        name = _name(trial_number, token)
        if self._store is not None:
            content = self._store.read(f"{self._prefix}/{name}", most_bytes=_LARGEST_BYTES)
            return None if content is None else unseal(content)
        assert self._folder is not None
        return read_file(self._folder / name)

    def remove(self, trial_number: int, token: int) -> None:
        """The state isn't wanted any more; also one that isn't there. Raises OSError."""
        name = _name(trial_number, token)
        if self._store is not None:
            self._store.remove(f"{self._prefix}/{name}")
            return
        assert self._folder is not None
        if not self._folder.is_symlink():
            (self._folder / name).unlink(missing_ok=True)


def _name(trial_number: int, token: int) -> str:
    return f"{trial_number:d}-{token:d}.ckpt"
