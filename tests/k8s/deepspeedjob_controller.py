"""A stand-in for DeepSpeedJob's controller, which is not public: its part, played through the real API.

What its manual says and nothing else: pods `<job>-worker-<i>` as root with a hostfile at /t9k/hostfile,
one process per slot with the ranks that DeepSpeed's launcher sets, worker 0's end decides, then phase
and conditions. sshd and pdsh are left out: each pod starts its own slots, with the environment that they
would have through ssh: the few variables that DeepSpeed hands on (runner.py, PDSHRunner), and those of the
container's that the controller has written into /root/.deepspeed_env.
"""

from __future__ import annotations

import base64
import copy
import shlex
import threading
import time

import harness

GROUP = "batch.tensorstack.dev/v1beta1"
SLOTS = r"""
mkdir -p /root
for name in $NAMES; do printf '%s=%s\n' "$name" "${!name}"; done > /root/.deepspeed_env
exports=
add() { # as MultiNodeRunner.add_export: what the other node's shell reads
  local value=${1#*=}
  [[ $value =~ ^[A-Za-z0-9_@%+=:,./-]*$ ]] || value="\"$value\""
  exports+="export ${1%%=*}=$value; "
}
while read -r line; do add "$line"; done < <(env | grep -E '^(PYTHON|NCCL|MLFLOW|MV2|UCX)')
if [ -f "$HOME/.deepspeed_env" ]; then while read -r line; do add "$line"; done < "$HOME/.deepspeed_env"; fi
ssh=(env -i HOME=/root USER=root LOGNAME=root SHELL=/bin/bash PATH=/usr/local/bin:/usr/bin:/bin)
for slot in $(seq 0 $((SLOTS - 1))); do
  ranks="export RANK=$((INDEX * SLOTS + slot)) LOCAL_RANK=$slot LOCAL_SIZE=$SLOTS WORLD_SIZE=$((REPLICAS * SLOTS))"
  ranks+=" MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT"
  "${ssh[@]}" bash -c "$exports $ranks; $* --local_rank=$slot" &
  pids="$pids $!"
done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
"""


class Controller(threading.Thread):
    """Watches DeepSpeedJobs; `spelling` is old or new: a failed job is Completed in the new one."""

    def __init__(self, spelling: str = "new"):
        super().__init__(daemon=True)
        self.spelling = spelling
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)

    def run(self) -> None:
        while not self._stopped.wait(0.5):
            for job in harness.get("deepspeedjobs"):
                self._reconcile(job)

    def _reconcile(self, job: dict) -> None:
        if job.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return
        name, replicas = job["metadata"]["name"], job["spec"]["worker"]["replicas"]
        pods = {
            p["metadata"]["name"]: p
            for p in harness.get("pods")
            if job["metadata"]["uid"] in [o["uid"] for o in p["metadata"].get("ownerReferences", [])]
        }
        if not pods:
            for index in range(replicas):
                harness.kubectl("create", "-f", "-", given=worker(job, index))
            self._status(job, "Pending", {"Initialized": True})
            return
        phases = [
            pods[f"{name}-worker-{i}"]["status"]["phase"]
            for i in range(replicas)
            if f"{name}-worker-{i}" in pods
        ]
        first = pods.get(f"{name}-worker-0", {}).get("status", {}).get("phase", "Failed")
        if first == "Succeeded" and "Running" in phases:
            return  # pdsh on worker 0 ends after the last of its hosts
        if first in ("Succeeded", "Failed"):
            self._end(job, pods, "Failed" if "Failed" in phases else first)
        elif "Failed" in phases or len(phases) < replicas:
            self._end(job, pods, "Failed")
        elif set(phases) == {"Running"}:
            self._status(job, "Running", {"Initialized": True, "Running": True})

    def _end(self, job: dict, pods: dict, phase: str) -> None:
        for name, pod in pods.items():  # cleanUpPolicy: Unfinished
            if pod["status"]["phase"] in ("Pending", "Running"):
                harness.kubectl("delete", "pod", name, "-n", harness.NAMESPACE, "--wait=false", check=False)
        failed = phase == "Failed"
        completed = not failed or self.spelling == "new"
        self._status(
            job, phase, {"Initialized": True, "Running": False, "Completed": completed, "Failed": failed}
        )

    def _status(self, job: dict, phase: str, conditions: dict) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entries = [
            {
                "type": t,
                "status": str(v),
                "reason": t,
                "message": f"{job['metadata']['name']} {phase}",
                "lastTransitionTime": now,
            }
            for t, v in conditions.items()
        ]
        if self.spelling == "old":
            entries[0]["type"] = "Initializing"
        status = {"phase": phase, "conditions": entries}
        patch = {"status": status}
        harness.kubectl(
            "patch",
            "deepspeedjob",
            job["metadata"]["name"],
            "-n",
            harness.NAMESPACE,
            "--subresource=status",
            "--type=merge",
            "-p",
            harness.json.dumps(patch),
            check=False,
        )


def worker(job: dict, index: int) -> dict:
    """The pod of one worker: the user's template, as root, with the hostfile and the slots' processes."""
    template = copy.deepcopy(job["spec"]["worker"]["template"])
    replicas, slots = job["spec"]["worker"]["replicas"], job["spec"]["config"]["slotsPerWorker"]
    name, spec = job["metadata"]["name"], template["spec"]
    hosts = "".join(f"{name}-worker-{i} slots={slots}\n" for i in range(replicas))
    hostfile = base64.b64encode(hosts.encode()).decode()
    container = next((c for c in spec["containers"] if c["name"] == "worker"), spec["containers"][0])
    program = shlex.join(job["spec"]["config"]["run"]["exec"])
    container["command"] = [
        "bash",
        "-c",
        f"echo {hostfile} | base64 -d > /t9k/hostfile; set -- {program}\n{SLOTS}",
    ]
    names = " ".join(entry["name"] for entry in container.get("env", []))
    variables = {
        "NAMES": names,
        "SLOTS": slots,
        "INDEX": index,
        "REPLICAS": replicas,
        "MASTER_PORT": 29500,
        "MASTER_ADDR": f"{name}-worker-0.{name}",
    }
    ours = [{"name": key, "value": str(value)} for key, value in variables.items()]
    container["env"] = [*container.get("env", []), *ours]
    container.setdefault("volumeMounts", []).append({"name": "hostfile", "mountPath": "/t9k"})
    spec.setdefault("volumes", []).append({"name": "hostfile", "emptyDir": {}})
    spec["securityContext"] = {**spec.get("securityContext", {}), "runAsUser": 0}
    spec["restartPolicy"] = "Never"
    owner = {
        "apiVersion": GROUP,
        "kind": "DeepSpeedJob",
        "name": name,
        "uid": job["metadata"]["uid"],
        "controller": True,
    }
    metadata = {
        **template.get("metadata", {}),
        "name": f"{name}-worker-{index}",
        "namespace": harness.NAMESPACE,
        "ownerReferences": [owner],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
