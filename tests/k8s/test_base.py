"""k8s/base: what it installs is valid, the driver pod works with it, and its rights are all used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import harness

BASE = harness.REPO / "k8s" / "base"
ALL = {"gangs", "life", "failures", "outages", "pipeline", "backends"}


@pytest.fixture(scope="module")
def restricted():
    """A namespace as k8s/base makes it, beside the one that the tests use."""
    namespace = yaml.safe_load((BASE / "namespace.yaml").read_text())
    namespace["metadata"]["name"] = "rlhf-base"
    harness.kubectl("apply", "-f", "-", given=namespace)
    yield "rlhf-base"
    harness.kubectl("delete", "namespace", "rlhf-base", "--wait=false")


def kustomized(base: Path = BASE) -> list[dict]:
    return list(yaml.safe_load_all(harness.kubectl("kustomize", str(base))))


def test_the_api_server_takes_all_of_it(restricted):
    for body in kustomized():
        if body["kind"] != "Namespace":
            body["metadata"]["namespace"] = restricted
            for subject in body.get("subjects", []):
                subject["namespace"] = restricted
            harness.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=body)
    for name in ("chat.yaml", "rbac-backends.yaml"):
        harness.kubectl(
            "apply", "--dry-run=server", "--validate=strict", "-n", restricted, "-f", str(BASE / name)
        )


def test_the_driver_hands_its_own_image_to_its_jobs(tmp_path):
    copy = Path(shutil.copytree(BASE, tmp_path / "base"))
    file = copy / "kustomization.yaml"
    mine = [{"name": "rlhf", "newName": "registry.example/team/rlhf", "newTag": "7"}]
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"images": mine}))
    driver = next(body for body in kustomized(copy) if body["kind"] == "Deployment")
    [container] = driver["spec"]["template"]["spec"]["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert container["image"] == "registry.example/team/rlhf:7"
    assert env["SNAKEMAKE_KUBERNETES_GANG_IMAGE"] == "registry.example/team/rlhf:7"


def test_the_pods_of_a_job_and_the_driver_fit_a_restricted_namespace(restricted):
    golden = yaml.safe_load((harness.REPO / "tests/k8s/golden/job-one-pod.yaml").read_text())
    driver = next(body for body in kustomized() if body["kind"] == "Deployment")
    for name, template in (("job", golden["spec"]["template"]), ("driver", driver["spec"]["template"])):
        spec = {**template["spec"], "serviceAccountName": "default"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        harness.kubectl("create", "--dry-run=server", "-n", restricted, "-f", "-", given=pod)


@pytest.fixture
def audited():
    harness.needs_nodes("what the controllers have requested, from the API server's audit log")


def used_rights() -> tuple[set[tuple[str, str, str]], set[tuple[str, str, str]]]:
    """What the ServiceAccount of k8s/base has requested in this session: allowed, and refused."""
    allowed, refused = set(), set()
    for line in harness.audit_log().read_text().splitlines():
        event = json.loads(line)
        about = event["objectRef"]
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        right = (about.get("apiGroup", ""), resource, event["verb"])
        decision = event.get("annotations", {}).get("authorization.k8s.io/decision")
        (allowed if decision == "allow" else refused).add(right)
    return allowed, refused


def granted_rights() -> set[tuple[str, str, str]]:
    granted = set()
    for name in ("rbac.yaml", "rbac-backends.yaml"):
        for body in yaml.safe_load_all((BASE / name).read_text()):
            for rule in body.get("rules", []):
                granted |= {
                    (g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
                }
    return granted


def test_no_right_is_missing(audited):
    allowed, refused = used_rights()
    # An API server that has just started refuses for a moment what it grants before and after.
    assert not refused - allowed, "controllers have requested what k8s/base does not grant"


def test_no_right_is_unused(audited, request):
    ran = {item.path.stem.removeprefix("test_") for item in request.session.items}
    if not ran >= ALL:
        pytest.skip(
            f"rights count as unused only when the whole layer has run, not {', '.join(sorted(ran))} alone"
        )
    allowed, _ = used_rights()
    assert not granted_rights() - allowed, "k8s/base grants what no controller has used"
