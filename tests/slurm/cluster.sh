#!/usr/bin/env bash
# A throw-away, real Slurm cluster on one Debian or Ubuntu machine, without systemd. Needs root.
#
#   cluster.sh install             packages from apt
#   cluster.sh start               idempotent; VC_NODES virtual nodes with VC_GPUS fake GPUs each, below VC_DIR
#   cluster.sh exec CMD...         CMD on the virtual login node
#   cluster.sh exec-on NODE CMD... CMD inside one node
#   cluster.sh poweroff NODE       kill everything on a node at once (a power cut)
#   cluster.sh poweron NODE        bring it back
#   cluster.sh kill-slurmd NODE    kill only the daemon; what it has started lives on
#   cluster.sh stop                stop by recorded process numbers and remove the folder
#
# With VC_OWNER, a process number, the cluster stops by itself when that process has ended.
#
# Every node is a set of namespaces (uts, mount, pid, net) on a bridge without uplink, so nothing leaves the machine and
# each has its own host name, address, ports, process table and /dev/shm. Names are known only inside: a client started
# outside by mistake fails instead of talking to a stranger.
set -euo pipefail

D=${VC_DIR:?folder of the cluster}
N=${VC_NODES:-4}
G=${VC_GPUS:-8}
EXTRA_CONF=${VC_EXTRA_CONF:-}     # further lines of slurm.conf, before the nodes
EXTRA_PARTS=${VC_EXTRA_PARTS:-}   # further partitions; VC_GPU_PART: further words of the default one
KILLWAIT=${VC_KILLWAIT:-5}
SUBNET=198.51.100                 # TEST-NET-2; exists only inside the namespaces
export SLURM_CONF=$D/etc/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

die() { echo "cluster.sh: $*" >&2; exit 1; }
node() { printf 'node%03d' "$1"; }
starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
state() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f1; }
pid_of() { cut -d' ' -f1 "$D/run/$1.pid"; }
alive() { # the recorded process lives, is no zombie and no other with the same number
    local pid st
    [[ -s $D/run/$1.pid ]] || return 1
    read -r pid st < "$D/run/$1.pid"
    [[ "$(starttime "$pid")" == "$st" && "$(state "$pid")" != Z ]]
}
stop_one() { # NAME SIGNAL
    if alive "$1"; then
        local pid; pid=$(pid_of "$1")
        kill "-$2" "$pid" 2>/dev/null || true
        for _ in $(seq 50); do alive "$1" || break; sleep .1; done
        if alive "$1"; then kill -9 "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$D/run/$1.pid"
}
spawn() { # NAME LOG CMD...: a session of its own; every hop is an exec, so $! is CMD itself
    local name=$1 log=$2; shift 2
    (exec setsid "$@" < /dev/null > "$log" 2>&1 9>&-) &
    local pid=$!
    sleep .02
    echo "$pid $(starttime "$pid")" > "$D/run/$name.pid"
    disown
}
in_login() { nsenter --target "$(pid_of login)" --net --mount --uts --wd="$PWD" -- "$@"; }

write_conf() {
    mkdir -p "$D"/{etc,run,log,state,spool,dev,bin}
    chmod 755 "$D" "$D"/{etc,run,log,spool,dev,bin}
    (umask 077; head -c 1024 /dev/urandom > "$D/etc/munge.key")
    local nodes i; nodes="node[$(printf %03d 1)-$(printf %03d "$N")]"
    { echo "127.0.0.1 localhost"; echo "$SUBNET.1 login"
      for i in $(seq "$N"); do echo "$SUBNET.$((i + 9)) $(node "$i")"; done; } > "$D/etc/hosts"
    for i in $(seq 0 $((G - 1))); do [[ -c $D/dev/nvidia$i ]] || mknod -m 666 "$D/dev/nvidia$i" c 1 3; done
    { echo AutoDetect=off; [[ $G == 0 ]] || echo "NodeName=$nodes Name=gpu File=$D/dev/nvidia[0-$((G - 1))]"; } > "$D/etc/gres.conf"
    : > "$D/etc/plugstack.conf"
    [[ ! -f $D/etc/fake_pyxis.so ]] || echo "optional $D/etc/fake_pyxis.so" > "$D/etc/plugstack.conf"
    # cred_expire: a requeued job waits that long and a second; the default of 120 s would be most of every test.
    cat > "$D/etc/slurm.conf" << CONF
ClusterName=virtual
SlurmctldHost=login
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.own.pid
SlurmdPidFile=$D/run/slurmd.%n.own.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
PlugStackConfig=$D/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=$KILLWAIT
UnkillableStepTimeout=60
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=0
PriorityType=priority/basic
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldDebug=info
SlurmdDebug=info
$EXTRA_CONF
CONF
    for i in $(seq "$N"); do
        echo "NodeName=$(node "$i") Port=16818 CPUs=64 Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 $([[ $G == 0 ]] || echo "Gres=gpu:$G") State=UNKNOWN"
    done >> "$D/etc/slurm.conf"
    echo "PartitionName=gpu Nodes=$nodes Default=YES MaxTime=INFINITE DefaultTime=60 State=UP ${VC_GPU_PART:-}
$EXTRA_PARTS" >> "$D/etc/slurm.conf"
}

start_login() { # a namespace with the bridge, the controller and whoever submits
    alive login && return 0
    spawn login "$D/log/login.log" unshare --net --mount --uts bash -c "
        hostname login; mount --bind $D/etc/hosts /etc/hosts; ip link set lo up
        ip link add br0 type bridge && ip addr add $SUBNET.1/24 dev br0 && ip link set br0 up
        touch $D/run/login.ready; exec sleep infinity"
    for _ in $(seq 200); do [[ -e $D/run/login.ready ]] && break; sleep .02; done
    [[ -e $D/run/login.ready ]] || die "login node did not come up: $(cat "$D/log/login.log")"
    rm -f "$D/run/login.ready"
}

start_node() { # INDEX. bash is the namespace's init: it reaps orphans, and its death is the power cut
    local i=$1 n init=""; n=$(node "$1")
    alive "node.$n" && return 0
    rm -f "$D/run/$n.net"
    spawn "node.$n" "$D/log/slurmd.$n.out" unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -c "
        hostname $n; mount --bind $D/etc/hosts /etc/hosts; ip link set lo up
        mount -t tmpfs -o mode=1777 shm /dev/shm
        until [ -e $D/run/$n.net ]; do sleep .01; done
        slurmd -D -N $n & echo \$! > $D/run/$n.slurmd
        trap : TERM; while :; do sleep infinity & wait \$!; done"
    for _ in $(seq 400); do
        init=$(pgrep -P "$(pid_of "node.$n")" 2>/dev/null | head -1 || true)
        [[ -n $init && "$(readlink "/proc/$init/ns/net")" != "$(readlink /proc/self/ns/net)" ]] && break
        sleep .01
    done
    [[ -n $init ]] || die "node $n did not start: $(cat "$D/log/slurmd.$n.out")"
    echo "$init" > "$D/run/$n.init"
    nsenter --target "$(pid_of login)" --net -- sh -c "
        ip link del v$i 2>/dev/null
        ip link add v$i type veth peer name eth0 netns $init && ip link set v$i master br0 up"
    nsenter --target "$init" --net -- sh -c "ip addr add $SUBNET.$((i + 9))/24 dev eth0; ip link set eth0 up"
    touch "$D/run/$n.net"
}

start_ctl() {
    if ! alive munged; then
        spawn munged "$D/log/munged.out" munged -F --key-file="$D/etc/munge.key" --socket="$D/run/munge.sock" \
            --pid-file="$D/run/munged.own.pid" --log-file="$D/log/munged.log" --seed-file="$D/run/munge.seed"
        for _ in $(seq 200); do [[ -S $D/run/munge.sock ]] && break; sleep .05; done
        [[ -S $D/run/munge.sock ]] || die "munged: $(cat "$D"/log/munged.*)"
    fi
    alive slurmctld || spawn slurmctld "$D/log/slurmctld.out" nsenter --target "$(pid_of login)" --net --mount --uts \
        --wd="$PWD" -- slurmctld -i -D
}

wait_idle() {
    local end=$((SECONDS + ${VC_WAIT:-90})) n=0
    while [[ $SECONDS -lt $end ]]; do
        n=$(in_login sinfo -h -N -o '%N %t' 2>/dev/null | sort -u | grep -cE ' (idle|mix|alloc|comp)$' || true)
        [[ $n == "$N" ]] && return 0
        sleep .1
    done
    in_login sinfo -N -l || true
    die "only $n of $N nodes came up"
}

cmd_start() {
    mkdir -p "$D"; exec 9> "$D/.lock"; flock 9
    alive slurmctld || write_conf
    start_login; start_ctl
    local i; for i in $(seq "$N"); do start_node "$i"; done
    # A test session that is killed must not leave a cluster behind.
    [[ -z ${VC_OWNER:-} ]] || alive watchdog || spawn watchdog "$D/log/watchdog.log" bash -c \
        "while kill -0 $VC_OWNER 2> /dev/null; do sleep 2; done; umount --lazy $D/small 2> /dev/null; VC_DIR=$D exec $(realpath "$0") stop"
    wait_idle
}

cmd_stop() {
    local f
    [[ -d $D/run ]] || return 0
    [[ ! -e $D/run/watchdog.pid || "$(pid_of watchdog)" == "$$" ]] || stop_one watchdog TERM
    stop_one slurmctld TERM
    for f in "$D"/run/node.*.pid; do [[ ! -e $f ]] || { f=${f##*/}; stop_one "${f%.pid}" KILL; }; done
    stop_one munged TERM; stop_one login KILL
    rm -rf "$D"
}

case "${1:-}" in
install)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge procps iproute2 util-linux \
        libslurm-dev gcc libc6-dev ;;
start) cmd_start ;;
stop) cmd_stop ;;
exec) shift; in_login "$@" ;;
exec-on) shift; n=$1; shift; exec nsenter --target "$(cat "$D/run/$n.init")" --net --mount --uts --pid --wd="$PWD" -- "$@" ;;
poweroff) [[ -s $D/run/node.$2.pid ]] || die "no node $2"; stop_one "node.$2" KILL ;;
poweron) start_node "$((10#${2#node}))" ;;
kill-slurmd) nsenter --target "$(cat "$D/run/$2.init")" --pid --mount -- sh -c "kill -9 $(cat "$D/run/$2.slurmd")" ;;
*) sed -n '2,14p' "$0" ;;
esac
