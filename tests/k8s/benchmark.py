"""Many jobs at once: 200 run, 1,000 wait. `make bench-k8s`; the cluster of `make test-k8s` has to run.

Nodes are objects without a kubelet; this program keeps them alive and marks their pods as running and
done. Printed: the rate of submission, and every 10 s the controller's memory and CPU, and its requests.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness

JOBS, NODES, PODS, RUN_S = 1200, 20, 10, 30.0
SNAKEFILE = f"""
rule all:
    input: expand("out/{{n}}", n=range({JOBS}))
rule one:
    output: "out/{{n}}"
    resources: mem_mb=10, shm_mb=1, cpu="1m"
    shell: "touch {{output}}"
"""


def admin():
    os.environ["KUBECONFIG"] = str(harness.directory() / "kubeconfig")
    from snakemake_executor_plugin_kubernetes_gang.cluster import Cluster

    return Cluster(None, harness.NAMESPACE, print)


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
    """Plays the kubelets of all nodes: heartbeats, and pods that run for RUN_S and succeed."""

    def __init__(self, api, names: list[str]):
        super().__init__(daemon=True)
        self.api, self.names, self.started, self.most = api, names, {}, 0
        self.workdir = None

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
        except Exception:
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
        if time.monotonic() - begun > RUN_S:
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
        patch(
            self.api, path, {"status": {"phase": phase, "startTime": now(), "containerStatuses": [container]}}
        )


def requests_so_far() -> Counter[str]:
    """What the controller has asked the API server for, by verb and resource."""
    asked: Counter[str] = Counter()
    for line in harness.audit_log().read_text().splitlines():
        event = json.loads(line)
        about = event["objectRef"]
        asked[f"{event['verb']} {about['resource']}/{about.get('subresource', '')}".rstrip("/")] += 1
    return asked


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    api = admin()
    names = make_nodes(api)
    kubelets = Kubelets(api, names)
    place = harness.Workdir("bench", SNAKEFILE)
    (place.path / "out").mkdir()
    place.template.write_text(json.dumps({"spec": {
        "nodeSelector": {"bench": "yes"}, "tolerations": [{"operator": "Exists"}], "containers": [{"name": "main"}],
    }}))  # fmt: skip
    place.give()
    kubelets.workdir = place.path
    kubelets.start()
    begun, first = time.monotonic(), requests_so_far()
    options = ["--jobs", str(JOBS), "--max-jobs-per-timespan", "1000/1s", "--default-resources", "cpu='1m'"]
    process = place.start(*options, "--latency-wait", "0", "--keep-going")
    try:
        sample(process, place, kubelets, begun, first)
    finally:
        harness.kill(process)
        harness.kubectl(
            "delete",
            "jobs",
            "-n",
            harness.NAMESPACE,
            "-l",
            f"kubernetes-gang/place={place.place()}",
            "--wait=false",
        )
        harness.kubectl("delete", "nodes", "-l", "bench=yes")


def sample(process, place, kubelets, begun: float, first: Counter[str]) -> None:
    print("seconds  jobs made  running (most)  done  MB  CPU s  API requests/s")
    submission = threading.Thread(target=time_submission, args=(process, place), daemon=True)
    submission.start()
    last = first.total()
    while process.poll() is None and time.monotonic() - begun < 500:
        time.sleep(10)
        if process.poll() is not None:
            break
        done, so_far = place.said().count("Finished jobid"), requests_so_far().total()
        print(
            f"{time.monotonic() - begun:7.0f} {made(place):10d} {kubelets.most:15d} {done:5d} {memory_mb(process.pid):6.0f} "
            f"{cpu_s(process.pid):6.0f} {(so_far - last) / 10:10.1f}",
            flush=True,
        )
        last = so_far
    done = place.said().count("Finished jobid")
    print(f"{done} of {JOBS} jobs done in {time.monotonic() - begun:.0f} s, load {os.getloadavg()[0]:.1f}")
    for what, number in (requests_so_far() - first).most_common(8):
        print(f"{number / JOBS:6.2f} requests per job: {what}")


def made(place) -> int:
    return len(list(place.path.glob(".snakemake/auxiliary/kubernetes-gang/*/token")))


def time_submission(process, place) -> None:
    """Print how fast jobs are created, from the first one on: what Snakemake does before is its own."""
    while not made(place) and process.poll() is None:
        time.sleep(0.1)
    begun = time.monotonic()
    while made(place) < JOBS and process.poll() is None:
        time.sleep(0.5)
    seconds = time.monotonic() - begun
    print(
        f"{made(place)} jobs submitted in {seconds:.0f} s: {made(place) / seconds:.1f} a second", flush=True
    )


if __name__ == "__main__":
    main()
