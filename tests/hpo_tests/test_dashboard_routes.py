"""Which of optuna-dashboard's routes change anything, and how bad input is answered."""

import json
from collections.abc import Callable, Iterator
from wsgiref.types import WSGIApplication

import bottle
import optuna
import optuna_dashboard
import pytest

from hpo.dashboard_routes import CHANGES, Rules
from hpo.door import READING
from tests.dashboards import ask, open_app

_STUDY = "/api/studies/<study_id:int>"
_ARTIFACT = "<artifact_id:re:[0-9a-fA-F-]+>"

READ = {
    "/",
    "/dashboard<:re:(/.*)?>",
    "/api/meta",
    "/api/studies",
    _STUDY,
    f"{_STUDY}/param_importances",
    f"{_STUDY}/plot/<plot_type>",
    "/csv/<study_id:int>",
    "/favicon.ico",
    "/static/<filename:path>",
    "/incompatible-rdb-schema",
    f"/artifacts/<study_id:int>/{_ARTIFACT}",
    f"/artifacts/<study_id:int>/<trial_id:int>/{_ARTIFACT}",
}
ALLOWED = {
    ("DELETE", _STUDY),
    ("PUT", f"{_STUDY}/note"),
    ("PUT", f"{_STUDY}/<trial_id:int>/note"),
}
REFUSED = {
    # a study that a launch can't go on with, and whose name it then can't have
    ("POST", "/api/studies"),
    # makes another study of copied trials and deletes ours, with its leases
    ("POST", f"{_STUDY}/rename"),
    # a trial's end and its attributes are its worker's
    ("POST", "/api/trials/<trial_id:int>/tell"),
    ("POST", "/api/trials/<trial_id:int>/user-attrs"),
    # preferential optimization, which no study of ours is
    ("POST", f"{_STUDY}/<trial_id:int>/skip"),
    ("POST", f"{_STUDY}/preference"),
    ("PUT", f"{_STUDY}/preference_feedback_component"),
    ("DELETE", f"{_STUDY}/preference/<history_id>"),
    ("POST", f"{_STUDY}/preference/<history_id>"),
    # there is no store of artifacts
    ("POST", "/api/artifacts/<study_id:int>"),
    ("POST", "/api/artifacts/<study_id:int>/<trial_id:int>"),
    ("DELETE", f"/api/artifacts/<study_id:int>/{_ARTIFACT}"),
    ("DELETE", f"/api/artifacts/<study_id:int>/<trial_id:int>/{_ARTIFACT}"),
    # migrates the tables
    ("POST", "/incompatible-rdb-schema"),
    # there is no language model
    ("POST", "/api/llm/trial_filter_query"),
    ("POST", "/api/llm/generate_plotly_graph_query"),
    ("POST", "/api/llm/re_generate_plotly_graph_query"),
}


@pytest.fixture
def app(clothes: optuna.storages.RDBStorage) -> WSGIApplication:
    return open_app(clothes)


@pytest.fixture
def everything(clothes: optuna.storages.RDBStorage) -> Callable[[], str]:
    """All that the storage holds, in words."""

    def told() -> str:
        clothes.scoped_session.remove()
        return "\n".join(
            repr(
                (
                    study.study_name,
                    study.user_attrs,
                    study.system_attrs,
                    clothes.get_all_trials(study._study_id),
                )
            )
            for study in clothes.get_all_studies()
        )

    return told


def address(rule: str) -> str:
    """One that the route takes: study 1, trial 1."""
    for wildcard, value in {
        "<study_id:int>": "1",
        "<trial_id:int>": "1",
        _ARTIFACT: "abc",
        "<history_id>": "x",
        "<plot_type>": "edf",
        "<filename:path>": "nothing.js",
        "<:re:(/.*)?>": "",
    }.items():
        rule = rule.replace(wildcard, value)
    assert "<" not in rule
    return rule


def test_every_route_of_the_app_is_decided_upon(clothes: optuna.storages.RDBStorage) -> None:
    routes = optuna_dashboard.wsgi(optuna.storages.get_storage(clothes)).routes
    reading = {route.rule for route in routes if route.method in READING}
    changing = {(route.method, route.rule) for route in routes if route.method not in READING}
    assert reading == READ
    assert changing == ALLOWED | REFUSED
    assert set(CHANGES) == ALLOWED


@pytest.mark.parametrize(("method", "rule"), sorted(REFUSED))
@pytest.mark.parametrize(
    "body",
    [
        {},
        {
            "user_attrs": {"config": {"backbone": "os:system"}},
            "state": "fail",
            "study_name": "theirs",
            "directions": ["maximize"],
            "mode": "ChooseWorst",
            "candidates": [0, 1],
            "clicked": 0,
            "output_type": "note",
            "file": "data:text/plain;base64,aGE=",
        },
    ],
)
def test_what_belongs_to_the_leases_is_refused_and_stays_as_it_is(
    app: WSGIApplication,
    everything: Callable[[], str],
    method: str,
    rule: str,
    body: dict[str, object],
) -> None:
    before = everything()
    for path in (address(rule), f"{address(rule)}/", f"{address(rule)}//"):
        answer = ask(app, path, method=method, body=json.dumps(body).encode())
        assert answer.status == 403, path
        assert "changed by hpo's commands" in json.loads(answer.body)["reason"]
    assert everything() == before


def test_a_running_trial_keeps_its_state_and_attributes(
    clothes: optuna.storages.RDBStorage,
) -> None:
    study = optuna.load_study(study_name="clothes", storage=clothes)
    trial = study.ask()
    trial.set_user_attr("config", {"backbone": "resnet8"})
    app = open_app(clothes)
    path = f"/api/trials/{trial._trial_id}"
    told = ask(app, f"{path}/tell", method="POST", body=b'{"state": "Fail"}')
    attributes = b'{"user_attrs": {"config": {"backbone": "evil:run"}, "anything": 1}}'
    written = ask(app, f"{path}/user-attrs", method="POST", body=attributes)
    assert (told.status, written.status) == (403, 403)
    clothes.scoped_session.remove()
    now = study.get_trials()[trial.number]
    assert now.state == optuna.trial.TrialState.RUNNING
    assert now.user_attrs == {"config": {"backbone": "resnet8"}}
    study.tell(trial, state=optuna.trial.TrialState.FAIL)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "ANY", "WHATEVER"])
def test_a_route_that_a_later_version_brings_is_refused(method: str) -> None:
    app = bottle.Bottle()
    app.install(Rules(optuna.storages.InMemoryStorage()))
    app.route("/new", method, callback=lambda: "done")
    app.route("/read", "GET", callback=lambda: "read")
    asked = "POST" if method == "ANY" else method
    assert ask(app, "/new", method=asked).status == 403
    assert ask(app, "/read").body == "read"


def note(app: WSGIApplication, text: str, *, of: str = "/api/studies/1", version: int = 1) -> int:
    body = json.dumps({"version": version, "body": text}).encode()
    return ask(app, f"{of}/note", method="PUT", body=body).status


def test_notes_are_written(app: WSGIApplication, clothes: optuna.storages.RDBStorage) -> None:
    assert note(app, "of the study") == 204
    assert note(app, "too late") == 409
    assert note(app, "of a trial", of="/api/studies/1/1") == 204
    study = json.loads(ask(app, "/api/studies/1").body)
    assert study["note"]["body"] == "of the study"
    assert (
        next(trial for trial in study["trials"] if trial["trial_id"] == 1)["note"]["body"]
        == "of a trial"
    )
    clothes.scoped_session.remove()


@pytest.fixture
def another(clothes: optuna.storages.RDBStorage) -> Iterator[int]:
    """The id of a second study."""
    found = optuna.create_study(storage=clothes, study_name="another")._study_id
    yield found
    clothes.scoped_session.remove()
    if found in {study._study_id for study in clothes.get_all_studies()}:
        clothes.delete_study(found)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"remove_associated_artifacts": true}'])
def test_a_study_is_deleted(
    app: WSGIApplication, clothes: optuna.storages.RDBStorage, another: int, body: bytes
) -> None:
    path = f"/api/studies/{another}"
    assert ask(app, path, method="DELETE", body=body).status == 204
    clothes.scoped_session.remove()
    assert [study.study_name for study in clothes.get_all_studies()] == ["clothes"]
    assert ask(app, path, method="DELETE", body=body).status == 404


def test_what_is_not_there_is_not_found(app: WSGIApplication, another: int) -> None:
    assert note(app, "x", of="/api/studies/4711") == 404
    assert note(app, "x", of="/api/studies/4711/1") == 404
    assert note(app, "x", of="/api/studies/1/4711") == 404
    assert note(app, "x", of=f"/api/studies/{another}/1") == 404, "a trial of another study"
    for path in ("", "/param_importances", "/plot/edf"):
        assert ask(app, f"/api/studies/4711{path}").status == 404, path
    assert ask(app, "/csv/4711").status == 404


BAD_BODIES = [
    b"",
    b"{",
    b"nonsense",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"version": 1' + b"0" * 5000 + b"}",
    b"{}",
    b'{"version": 1}',
    b'{"body": "x"}',
    *(
        b'{"version": %s, "body": "x"}' % version
        for version in (b"null", b'"1"', b"1.0", b"true", b"NaN", b"1e999", b"-Infinity", b"0",
                        b"-1", b"99999999999999999999", b"[]", b"{}")
    ),
    *(
        b'{"version": 1, "body": %s}' % text
        for text in (b"null", b"1", b"NaN", b"true", b"[]", b'["x"]', b'{"a": 1}')
    ),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_note_that_is_none_is_bad_input(
    app: WSGIApplication, everything: Callable[[], str], body: bytes
) -> None:
    before = everything()
    for path in ("/api/studies/1/note", "/api/studies/1/1/note"):
        answer = ask(app, path, method="PUT", body=body)
        assert answer.status == 400, body[:40]
        assert json.loads(answer.body)["reason"]
    assert everything() == before


@pytest.mark.parametrize(
    "body", [b"{", b"null", b"[]", b"1", b'{"remove_associated_artifacts": "no"}']
)
def test_a_deletion_that_is_none_deletes_nothing(app: WSGIApplication, body: bytes) -> None:
    assert ask(app, "/api/studies/1", method="DELETE", body=body).status == 400
    assert ask(app, "/api/studies/1").status == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_change_that_is_not_sent_as_json_is_bad_input(app: WSGIApplication, kind: str) -> None:
    body = b'{"version": 1, "body": "x"}'
    answer = ask(app, "/api/studies/1/note", method="PUT", body=body, CONTENT_TYPE=kind)
    assert answer.status == 400


@pytest.mark.parametrize("number", ["2147483648", "9" * 30, "9" * 5000, "-1", "-2147483649"])
@pytest.mark.parametrize("rule", sorted(READ))
def test_a_number_that_is_none_is_bad_input(app: WSGIApplication, rule: str, number: str) -> None:
    if "_id:int>" not in rule:
        assert ask(app, address(rule)).status < 500
        return
    for wildcard in ("<study_id:int>", "<trial_id:int>"):
        answer = ask(app, address(rule.replace(wildcard, number)))
        assert answer.status == (400 if wildcard in rule else ask(app, address(rule)).status)
    assert ask(app, f"/api/studies/{number}/note", method="PUT", body=b"{}").status == 400
    assert ask(app, f"/api/studies/{number}", method="DELETE").status == 400


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "", "%00", "NaN", "9" * 20, "9" * 5000])
def test_a_place_that_is_none_is_bad_input(app: WSGIApplication, after: str) -> None:
    assert ask(app, f"/api/studies/1?after={after}").status == 400
    form = {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
    assert ask(app, "/api/studies/1", body=f"after={after}".encode(), **form).status == 400


def test_pages_poll_for_what_is_new(app: WSGIApplication) -> None:
    def shown(query: str) -> list[int]:
        answer = ask(app, f"/api/studies/1{query}")
        return [trial["number"] for trial in json.loads(answer.body)["trials"]][:4]

    assert shown("") == [0, 1, 2, 3]
    assert shown("?after=2")[:2] == [2, 3]


@pytest.mark.parametrize("ids", ["x", "1,,2", "9" * 5000, "%00", "1;2"])
def test_numbers_of_trials_that_are_none_are_bad_input(app: WSGIApplication, ids: str) -> None:
    assert ask(app, f"/csv/1?trial_ids={ids}").status == 400


TRAVERSALS = [
    "../_app.py",
    "../../optuna_dashboard/_app.py",
    "..%2f_app.py",
    "%2e%2e/_app.py",
    "..\\_app.py",
    "....//_app.py",
    "/etc/passwd",
    "//etc/passwd",
    "bundle.js/../../_app.py",
    "\0../_app.py",
    "../public/../_app.py",
    "../index.html\0.js",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_file_outside_of_the_app_s_own_is_sent(app: WSGIApplication, path: str) -> None:
    for encoding in ("identity", "gzip"):
        answer = ask(app, f"/static/{path}", HTTP_ACCEPT_ENCODING=encoding)
        assert answer.status in (403, 404)
        assert "import" not in answer.body
        assert "root:" not in answer.body


def test_the_app_s_own_files_are_sent(app: WSGIApplication) -> None:
    assert ask(app, "/static/bundle.js").status == 200
