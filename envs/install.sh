#!/usr/bin/env bash
# What the training image is made of, step by step; run by envs/Dockerfile and by its test.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

system() { # python, and what the executor's entrypoint runs: bash, getent, setpriv
  apt-get update
  apt-get install -y --no-install-recommends bash ca-certificates libc-bin python3 python3-venv util-linux
}

packages() { # what pyproject.toml requires, in the lock's versions; torch includes CUDA
  python3 -m venv /opt/venv
  /opt/venv/bin/pip install --upgrade pip # Debian's builds source packages in an old way
  python3 - "$here/pyproject.toml" > /tmp/requirements.txt <<'PY'
import sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(*project["dependencies"], sep="\n")
PY
  /opt/venv/bin/pip install -c "$here/constraints.txt" -r /tmp/requirements.txt
  rm /tmp/requirements.txt
}

ssh() { # DeepSpeedJob's worker 0 starts the others through pdsh and ssh
  apt-get update
  apt-get install -y --no-install-recommends openssh-server pdsh
  mkdir -p /run/sshd
  chown root:root /usr/lib # pdsh refuses a library directory that is not root's
}

"$1"
