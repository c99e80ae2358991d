"""What can go wrong between us and the database. Each message is one line, for the user."""


class StorageError(Exception):
    """The database can't be used as it is: wrong kind, wrong schema, wrong rights."""


class DatabaseUnreachable(StorageError):
    """The database gave no answer for as long as we were willing to wait."""


class StudyNotFound(StorageError):
    """No study of that name in this database."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"no study {name[:80]!r} in this database: hpo studies lists those there are"
        )


class StudyDeleted(StudyNotFound):
    """Somebody deleted the study while it was in use."""

    def __init__(self) -> None:
        StorageError.__init__(
            self, "the study was deleted while it ran: the same launch begins it anew"
        )


class LeaseLost(Exception):
    """Somebody else has the trial, or it has ended: what was to be written is not written."""
