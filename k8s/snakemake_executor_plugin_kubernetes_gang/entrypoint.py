"""The script that a pod runs around the rule's command.

Its parameters are environment variables, so the text is the same for every gang.

- It checks that the pod sees the controller's working directory and project: the controller writes a
  token into the gang's state directory before it submits.
- It stops the command when the token changes: the cluster cannot end a pod on a node that has lost its
  connection, and that pod must not write to the same files as its successor.
- It waits for rank 0's address, which can be resolved only some time after rank 0's pod exists.
"""

# Commands use exit codes below 64, shells those above 125.
CODE_OTHER_VOLUME = 97
CODE_SUPERSEDED = 98
CODE_NO_ADDRESS = 99
POLL_S = 3

ENTRYPOINT = rf"""
say() {{ echo "kubernetes-gang: $*" >&2; }}
for try in 1 2 3 4 5 6 7 8 9 10; do
  [ -r "$GANG_STATE/token" ] && [ -e "$GANG_PROJECT" ] && cd "$GANG_WORKDIR" 2>/dev/null && break
  sleep 3
done
[ -r "$GANG_STATE/token" ] || {{ say "this pod does not see the controller's working directory: \
$GANG_STATE/token is missing. Mount the same volume at the same path"; exit {CODE_OTHER_VOLUME}; }}
[ -e "$GANG_PROJECT" ] || {{ say "this pod does not see the project: $GANG_PROJECT is missing. \
Put it on the volume, or into the image at the same path"; exit {CODE_OTHER_VOLUME}; }}
cd "$GANG_WORKDIR" || exit {CODE_OTHER_VOLUME}
[ -r "${{SSL_CERT_FILE:-/}}" ] || {{ say "SSL_CERT_FILE=$SSL_CERT_FILE is not in this pod and is left out. \
Put it on the volume, or into the image at the same path"; unset SSL_CERT_FILE; }}
current() {{ local token; read -r token 2>/dev/null < "$GANG_STATE/token" || return 0; [ "$token" = "$GANG_TOKEN" ]; }}
current || {{ say "another gang of this name has been started; this pod ends"; exit {CODE_SUPERSEDED}; }}
if [ "${{NNODES:-1}}" -gt 1 ]; then
  waited=0
  until getent hosts "$MASTER_ADDR" >/dev/null; do
    [ "$waited" -lt "$GANG_START_TIMEOUT" ] || {{ say "no address for $MASTER_ADDR after $waited s"; exit {CODE_NO_ADDRESS}; }}
    sleep 1; waited=$((waited + 1))
  done
fi
set -m
bash -c "trap : TERM; $GANG_COMMAND" &
child=$!
set +m
trap 'kill -TERM -- "-$child" 2>/dev/null' TERM INT
while kill -0 "$child" 2>/dev/null; do
  current || {{ say "another gang of this name has been started; this pod ends"; kill -KILL -- "-$child"; exit {CODE_SUPERSEDED}; }}
  sleep {POLL_S} & timer=$!
  wait -n "$child" "$timer"
  kill "$timer" 2>/dev/null
done
wait "$child"
"""

# Under DeepSpeedJob, processes on other nodes are started through ssh, without their pod's environment.
# DeepSpeed's launcher passes a few variables, and those that the job's controller wrote to a file; the
# image's PATH is not among them. The pod's first process has all variables, unless it is an sshd, which
# overwrites them with its title. The launcher's python is always called by its full path, so PATH can be
# completed from that.
ENVIRONMENT = r"""
while IFS= read -r -d '' pair; do
  name=${pair%%=*}
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || continue
  [ "$name" != PATH ] || PATH=${pair#*=}
  [ -n "${!name+set}" ] || export "$pair"
done 2>/dev/null < /proc/1/environ
read -r -d '' launcher < "/proc/$PPID/cmdline"
[[ $launcher != /* ]] || PATH=${launcher%/*}:$PATH
export PATH
"""

# Under DeepSpeedJob sshd, pdsh and DeepSpeed's launcher run as root. The command does not, so that its
# files belong to the volume's owner. IPC_LOCK is kept if the pod has it, because RDMA needs it.
AS_OWNER = r"""
keep=
setpriv --inh-caps=+ipc_lock --ambient-caps=+ipc_lock true 2>/dev/null && keep="--inh-caps=+ipc_lock --ambient-caps=+ipc_lock"
exec setpriv --reuid="$GANG_UID" --regid="$GANG_GID" --clear-groups $keep bash "$GANG_STATE/entrypoint.sh"
"""
