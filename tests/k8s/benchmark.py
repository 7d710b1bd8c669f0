"""Many jobs at once: 200 run, 1,000 wait; then 300 are taken up again and cancelled. `make bench-k8s`.

Nodes are objects without a kubelet; this program keeps them alive and marks their pods as running and
done. Printed: every 10 s the controller's memory and CPU, and its requests. Ends with 1 if a bound breaks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import harness
from snakemake_executor_plugin_kubernetes_gang.cluster import ApiError, Cluster

JOBS, NODES, PODS, RUN_S = 1200, 20, 10, 30.0
TAKEN_UP = 300
EVERY_S, LIMIT_S = 10, 500
# The bounds. Memory: once a quarter is done; the cluster takes minutes to make all pods. Requests: per job
# that is submitted or done, and beside them, per second: they must not go with the jobs that wait.
LEAST_RATE, MOST_GROWTH, MOST_REQUESTS, BESIDE = 20.0, 1.1, 3.0, 2.0
SNAKEFILE = """
rule all:
    input: expand("out/{{n}}", n=range({jobs}))
rule one:
    output: "out/{{n}}"
    resources: mem_mb=10, shm_mb=1, cpu="1m"
    shell: "touch {{output}}"
"""


def admin() -> Cluster:
    os.environ["KUBECONFIG"] = str(harness.directory() / "kubeconfig")
    return Cluster(None, harness.NAMESPACE, lambda text: None)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def patch(api, path: str, body: dict) -> None:
    api.request("PATCH", path, None, body, content="application/merge-patch+json")


def make_nodes(api) -> list[str]:
    names = [f"bench{n}" for n in range(NODES)]
    for name in names:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"bench": "yes"}}}
        node["spec"] = {"taints": [{"key": "bench", "effect": "NoSchedule"}]}
        harness.kubectl("apply", "-f", "-", given=node)
        sizes = {"cpu": "64", "memory": "64Gi", "pods": str(PODS)}
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "Bench",
            "lastHeartbeatTime": now(),
            "lastTransitionTime": now(),
        }
        patch(
            api,
            f"/api/v1/nodes/{name}/status",
            {"status": {"capacity": sizes, "allocatable": sizes, "conditions": [ready]}},
        )
    return names


class Kubelets(threading.Thread):
    """Plays the kubelets of all nodes: heartbeats, and pods that run for `run_s` and succeed."""

    def __init__(self, api, names: list[str]):
        super().__init__(daemon=True)
        self.api, self.names, self.started, self.most = api, names, {}, 0
        self.workdir, self.run_s = None, RUN_S

    def run(self) -> None:
        beat = 0.0
        while True:
            if time.monotonic() - beat > 10:
                beat = time.monotonic()
                for name in self.names:
                    self.heartbeat(name)
            self.pods()
            time.sleep(0.5)

    def heartbeat(self, name: str) -> None:
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
        lease["spec"] = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": stamp}
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        try:
            patch(self.api, f"{path}/{name}", lease)
        except ApiError:
            self.api.request("POST", path, None, lease)

    def pods(self) -> None:
        # Those on nodes only: a thousand that wait would be most of the API server's work.
        fields = "spec.nodeName!=,status.phase!=Succeeded"
        mine = self.api.list_all("Pod", "kubernetes-gang/gang", fields)
        self.most = max(self.most, sum(pod["status"]["phase"] == "Running" for pod in mine))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.move_on, mine))

    def move_on(self, pod: dict) -> None:
        uid, phase = pod["metadata"]["uid"], pod["status"]["phase"]
        if phase == "Pending":
            self.started[uid] = (time.monotonic(), now())
            self.mark(pod, "Running", {"running": {"startedAt": now()}})
            return
        begun, stamp = self.started.get(uid, (0.0, now()))
        if time.monotonic() - begun > self.run_s:
            self.run_command(pod)
            end = {"exitCode": 0, "reason": "Completed", "startedAt": stamp, "finishedAt": now()}
            self.mark(pod, "Succeeded", {"terminated": end})

    def run_command(self, pod: dict) -> None:
        """What the pod's command would do: it makes its output."""
        env = {e["name"]: e.get("value") for e in pod["spec"]["containers"][0]["env"]}
        output = self.workdir / env["GANG_COMMAND"].split()[-1]
        output.touch()
        os.chown(output, harness.OWNER, harness.OWNER)

    def mark(self, pod: dict, phase: str, state: dict) -> None:
        container = {
            "name": "main",
            "ready": phase == "Running",
            "restartCount": 0,
            "image": "x",
            "imageID": "x",
            "state": state,
        }
        path = self.api.path("Pod", pod["metadata"]["name"]) + "/status"
        status = {"phase": phase, "startTime": now(), "containerStatuses": [container]}
        try:
            patch(self.api, path, {"status": status})
        except ApiError as error:
            if error.status != 404:  # it was deleted meanwhile
                raise


@dataclass(frozen=True)
class Sample:
    """The controller at one moment; `requests` are those of the last EVERY_S, per second."""

    seconds: float
    submitted: int
    done: int
    memory_mb: float
    cpu_s: float
    requests: float


class Audit:
    """What controllers have asked the API server for since this was made, once per request.

    Without logs: those nodes have none, and who follows one asks again and again.
    """

    def __init__(self):
        self._skip = len(self._lines())

    def _lines(self) -> list[str]:
        whole, _, _ = harness.audit_log().read_text().rpartition("\n")
        return whole.splitlines()

    def events(self) -> list[dict]:
        found = map(json.loads, self._lines()[self._skip :])
        return [
            e
            for e in found
            if e["stage"] == "ResponseComplete" and e["objectRef"].get("subresource") != "log"
        ]


def submissions(events: list[dict]) -> list[float]:
    """When Jobs were created, in seconds."""
    created = [e for e in events if e["verb"] == "create" and "dryRun" not in e["requestURI"]]
    return sorted(datetime.fromisoformat(e["stageTimestamp"]).timestamp() for e in created)


def by_kind(events: list[dict]) -> Counter[str]:
    return Counter(f"{event['verb']} {event['objectRef']['resource']}" for event in events)


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    reason = harness.why_not()
    if reason or not harness.OURS:
        sys.exit(f"no benchmark: {reason or 'it needs a cluster of its own, for its audit log'}")
    with harness.running():
        api = admin()
        kubelets = Kubelets(api, make_nodes(api))
        broken = many(kubelets) + taken_up(kubelets)
        harness.kubectl("delete", "nodes", "-l", "bench=yes")
    for bound in broken:
        print(f"broken: {bound}")
    sys.exit(1 if broken else 0)


def workdir(name: str, jobs: int) -> harness.Workdir:
    place = harness.Workdir(name, SNAKEFILE.format(jobs=jobs))
    (place.path / "out").mkdir()
    place.template.write_text(
        json.dumps(
            {
                "spec": {
                    "nodeSelector": {"bench": "yes"},
                    "tolerations": [{"operator": "Exists"}],
                    "containers": [{"name": "main"}],
                }
            }
        )
    )
    place.give()
    return place


def start(place: harness.Workdir, *options: str):
    options = ("--jobs", str(JOBS), "--max-jobs-per-timespan", "1000/1s", "--latency-wait", "0", *options)
    return place.start(*options, "--default-resources", "cpu='1m'", "--keep-going")


def clean_up(process, place: harness.Workdir) -> None:
    harness.kill(process)
    mine = f"kubernetes-gang/place={place.place()}"
    harness.kubectl("delete", "jobs", "-n", harness.NAMESPACE, "-l", mine, "--wait=false")


def many(kubelets: Kubelets) -> list[str]:
    """Run JOBS jobs, as many at a time as the nodes take; return the bounds that do not hold."""
    place, audit = workdir("bench", JOBS), Audit()
    kubelets.workdir = place.path
    kubelets.start()
    process = start(place)
    try:
        samples, code = sample(process, place, audit), process.poll()
    finally:
        clean_up(process, place)
    if code != 0:
        print(place.said()[-2000:])
    created = submissions(audit.events())
    rate = len(created[1:]) / (created[-1] - created[0]) if created[1:] else 0.0
    print(f"{len(created)} jobs submitted, {rate:.1f} a second; up to {kubelets.most} ran at once")
    for what, number in by_kind(audit.events()).most_common(8):
        print(f"{number / JOBS:6.2f} requests per job: {what}")
    return bounds(samples, rate, code, kubelets.most)


def sample(process, place: harness.Workdir, audit: Audit) -> list[Sample]:
    """Look at the controller every EVERY_S until it ends, and print what is seen."""
    print("seconds  submitted  done  MB  CPU s  API requests/s")
    begun, last, samples = time.monotonic(), 0, []
    while process.poll() is None and time.monotonic() - begun < LIMIT_S:
        time.sleep(EVERY_S)
        if process.poll() is not None:
            break
        events, done = audit.events(), place.said().count("Finished jobid")
        now = Sample(
            time.monotonic() - begun,
            len(submissions(events)),
            done,
            memory_mb(process.pid),
            cpu_s(process.pid),
            (len(events) - last) / EVERY_S,
        )
        last = len(events)
        samples.append(now)
        print(
            f"{now.seconds:7.0f} {now.submitted:10d} {done:5d} {now.memory_mb:4.0f} {now.cpu_s:5.0f} {now.requests:10.1f}",
            flush=True,
        )
    return samples


def bounds(samples: list[Sample], rate: float, code: int | None, most: int) -> list[str]:
    """Return what does not hold, in words."""
    memory = [s.memory_mb for s in samples if s.done > JOBS / 4] or [0.0]
    held = {
        f"Snakemake ended with {code}, not 0, within {LIMIT_S} s": code == 0,
        f"{most} jobs ran at once, not {NODES * PODS}": most == NODES * PODS,
        f"{rate:.1f} jobs submitted a second, not {LEAST_RATE}": rate >= LEAST_RATE,
        f"memory grew from {memory[0]:.0f} to {max(memory):.0f} MB": max(memory) <= MOST_GROWTH * memory[0],
        **{
            f"{s.requests:.1f} requests a second after {s.seconds:.0f} s": few(s, last)
            for last, s in pairwise(samples)
        },
    }
    return [bound for bound, holds in held.items() if not holds]


def few(now: Sample, last: Sample) -> bool:
    """Whether requests go with the jobs that were submitted or done in between."""
    jobs = now.submitted - last.submitted + now.done - last.done
    return now.requests <= MOST_REQUESTS * jobs / EVERY_S + BESIDE


def taken_up(kubelets: Kubelets) -> list[str]:
    """Kill the controller of TAKEN_UP gangs, start it again, cancel them; return what does not hold."""
    place = workdir("bench-again", TAKEN_UP)
    kubelets.workdir, kubelets.run_s = place.path, float("inf")
    first = start(place)
    harness.wait_until("they are there", lambda: len(place.objects("jobs")) == TAKEN_UP, 120, every_s=1)
    harness.kill(first)
    place.unlock()
    process = start(place, "--kubernetes-gang-on-exit", "cancel")
    try:
        harness.wait_until("the first is taken up", lambda: "re-attached" in place.said(), every_s=0.1)
        seconds = until(lambda: place.said().count("re-attached") == TAKEN_UP)
        print(f"{TAKEN_UP} gangs taken up again in {seconds:.1f} s")
        os.kill(process.pid, signal.SIGINT)
        print(f"cancelled in {until(lambda: process.poll() is not None):.1f} s")
        left = [job for job in place.objects("jobs") if "deletionTimestamp" not in job["metadata"]]
    finally:
        clean_up(process, place)
    return [f"{len(left)} gangs left after they were cancelled"] if left else []


def until(condition) -> float:
    """Wait for it; return the seconds."""
    begun = time.monotonic()
    harness.wait_until("it is so", condition, 120, every_s=0.1)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
