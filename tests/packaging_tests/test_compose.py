"""docker-compose.yml and Dockerfile: nothing open, nothing by default, nothing that isn't there."""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.packaging_tests.project import CHECKOUT, PACKAGES, pyproject

COMPOSE: dict[str, Any] = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()


def words(value: Any) -> list[str]:
    """Every string in a piece of YAML."""
    if isinstance(value, dict):
        return [word for item in value.items() for part in item for word in words(part)]
    if isinstance(value, list):
        return [word for item in value for word in words(item)]
    return [value] if isinstance(value, str) else []


def interpolated(text: str) -> str:
    """As compose reads it with no variable set: ${NAME:-default} becomes its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_it_has_a_database_a_dashboard_and_workers_with_and_without_a_gpu() -> None:
    assert set(SERVICES) == {"postgres", "dashboard", "worker", "worker-cpu"}
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert SERVICES["worker"]["profiles"] == ["gpu"]
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in SERVICES["worker-cpu"]


def test_secrets_come_from_the_environment_and_have_no_default() -> None:
    required = re.compile(r"\$\{POSTGRES_PASSWORD:\?[^}]+\}")
    assert required.fullmatch(SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"])
    for service in OURS.values():
        assert required.fullmatch(service["environment"]["PGPASSWORD"])
        assert service["environment"]["HPO_STORAGE"] == "postgresql://hpo@postgres:5432/hpo"
    assert COMPOSE["secrets"] == {"dashboard_token": {"environment": "HPO_DASHBOARD_TOKEN"}}
    for word in words(COMPOSE):
        assert not re.search(r"\$\{\w*(PASSWORD|TOKEN)\w*(:?-|\})", word)
    assert not re.search(r"PASSWORD|TOKEN", DOCKERFILE)


def test_ports_are_published_on_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert [interpolated(port) for port in published] == [
        "127.0.0.1:5432:5432",
        "127.0.0.1:8080:8080",
    ]
    assert not any("network_mode" in service for service in SERVICES.values())


def test_everything_waits_for_a_healthy_database() -> None:
    assert "pg_isready" in SERVICES["postgres"]["healthcheck"]["test"]
    assert "healthcheck" in SERVICES["dashboard"]
    for service in OURS.values():
        assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_images_are_pinned() -> None:
    version = pyproject()["project"]["version"]
    assert all(service["image"] == f"hpo-vision:{version}" for service in OURS.values())
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    for image in [SERVICES["postgres"]["image"], *bases]:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+[.\d]*-[a-z-]+", image), image


def test_nothing_runs_as_root() -> None:
    assert SERVICES["postgres"]["user"] == "postgres"
    assert re.findall(r"^USER (\S+)", DOCKERFILE, flags=re.MULTILINE) == ["hpo"]
    for service in SERVICES.values():
        assert "user" not in service or service["user"] != "root"
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service.get("privileged", False)
    assert all(service["cap_drop"] == ["ALL"] for service in OURS.values())
    assert not any("docker.sock" in word for word in words(COMPOSE))


def test_exports_and_checkpoints_are_volumes_that_the_image_gives_to_its_user() -> None:
    assert set(COMPOSE["volumes"]) == {"exports", "home", "postgres"}
    for service in OURS.values():
        assert service["volumes"] == ["home:/var/lib/hpo", "exports:/exports"]
    assert re.search(
        r"install --directory --owner=hpo --group=hpo /exports /var/lib/hpo", DOCKERFILE
    )
    assert "HPO_HOME=/var/lib/hpo" in DOCKERFILE


@pytest.mark.parametrize("name", OURS)
def test_each_service_runs_a_command_that_there_is(name: str) -> None:
    command, *options = map(interpolated, OURS[name]["command"])
    shown = subprocess.run(
        [sys.executable, "-m", "hpo.cli", command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    ).stdout
    for option in options:
        if option.startswith("--"):
            assert re.search(rf"{option}\b", shown), option
    assert re.search(r'^ENTRYPOINT \["hpo"\]$', DOCKERFILE, flags=re.MULTILINE)


def test_the_image_gets_the_packages_and_nothing_else() -> None:
    ignored, *kept = (CHECKOUT / ".dockerignore").read_text().split()
    assert ignored == "*"
    allowed = {line.removeprefix("!") for line in kept if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    assert allowed == {name for line in copied for name in line.split()}
    assert allowed >= set(PACKAGES)
    for name in allowed:
        assert (CHECKOUT / name).exists()
