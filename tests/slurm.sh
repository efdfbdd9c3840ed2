#!/usr/bin/env bash
# Not a test: a real Slurm of one node on loopback, everything of it in a folder. Needs root and Debian's packages
# slurmctld, slurmd, slurm-client, munge and slurm-wlm-basic-plugins.
#   slurm.sh start DIR       the controller, and the node: all of this machine's cores, and two make-believe GPUs
#   slurm.sh stop DIR        whatever of it runs
#   slurm.sh node-up DIR     the node alone, after it was killed
set -euo pipefail
action=${1:?start, stop or node-up}
mkdir -p "${2:?a folder}"
D=$(cd "$2" && pwd)
NODE=$(hostname -s)
DEFAULT=/etc/slurm/slurm.conf       # where jobs look for it: Snakemake hides the variable from them
export SLURM_CONF=$D/slurm.conf

alive() { [ -s "$1" ] && [ -d "/proc/$(cat "$1")" ] && ! grep -q '^State:.Z' "/proc/$(cat "$1")/status"; }

wait_until() {                      # wait_until SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $end ] || { echo "slurm.sh: waited in vain: $*" >&2; return 1; }; sleep 0.2; done
}

idle() { [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; }

resumed() {                         # refused to a node that is up already, or not yet known to be back
  scontrol update nodename="$NODE" state=resume 2>/dev/null || true
  [[ "$(sinfo -h -o %T 2>/dev/null)" =~ ^(idle|mixed|allocated|completing)$ ]]
}

free_ports() {
  python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "12"]; print(*[x.getsockname()[1] for x in s])'
}

configure() {
  local ports; read -r -a ports < <(free_ports)
  local megabytes=$(( $(awk '/^MemTotal/ { print $2 }' /proc/meminfo) * 8 / 10240 ))
  cat > "$SLURM_CONF" <<END
ClusterName=rehearsal
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# a requeued job may start when credentials given before have expired: two minutes by default
AuthInfo=socket=$D/munge.socket,cred_expire=12
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.pid
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/completed.txt
MpiDefault=none
ReturnToService=2
KillWait=2
MinJobAge=300
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$megabytes Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=120 State=UP
END
  # two devices that Slurm takes for GPUs and gives to jobs by number
  printf 'NodeName=%s Name=gpu File=/dev/%s\n' "$NODE" null "$NODE" zero > "$D/gres.conf"
}

case $action in
start)
  [ ! -e "$DEFAULT" ] || { echo "slurm.sh: $DEFAULT is there already: this machine has a Slurm" >&2; exit 1; }
  chmod 755 "$D"; mkdir -p "$D"/{state,spool}; mkdir -p -m 700 "$D/munge"
  (umask 077; head -c 1024 /dev/urandom > "$D/munge/key")
  configure
  mkdir -p "$(dirname "$DEFAULT")"; ln -sfn "$SLURM_CONF" "$DEFAULT"      # over a dangling one
  munged --force --socket="$D/munge.socket" --key-file="$D/munge/key" --pid-file="$D/munged.pid" \
    --log-file="$D/munge/log" --seed-file="$D/munge/seed"
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF"
  wait_until 30 idle
  ;;
node-up)
  rm -f "$D/slurmd.pid"
  slurmd -f "$SLURM_CONF"
  wait_until 30 resumed
  ;;
stop)
  [ "$(readlink "$DEFAULT" || true)" != "$SLURM_CONF" ] || rm "$DEFAULT"
  [ ! -e "$SLURM_CONF" ] || timeout 10 scancel --full --user="$(id -un)" 2>/dev/null || true
  for signal in TERM KILL; do
    for name in slurmd slurmctld munged; do ! alive "$D/$name.pid" || kill -$signal "$(cat "$D/$name.pid")" || true; done
    gone() { for name in slurmd slurmctld munged; do ! alive "$D/$name.pid" || return 1; done; }
    ! wait_until 10 gone 2>/dev/null || exit 0
  done
  ;;
*) echo "slurm.sh: start, stop or node-up, not $action" >&2; exit 2 ;;
esac
