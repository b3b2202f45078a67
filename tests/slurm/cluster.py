"""The virtual cluster of `cluster.sh` from Python: start, submit, wait, cut the power, look for leftovers."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = HERE / "cluster.sh"

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
"""States that a job does not leave by itself."""

SANDBOXED = "in a sandbox"
"""Said of processes that have a process table of their own on a node."""

NS_GET_PARENT = 0xB702
"""ioctl: the namespace that a namespace is in."""

DAEMONS = ("bash", "sleep", "slurmd", "slurmstepd")
"""What runs on a node without a job."""


def why_not() -> str:
    """Why no cluster can be started here; empty when one can. Installs the packages where that is allowed."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster needs root (namespaces); run as root to have these tests"
    trial = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], check=False,
                           capture_output=True, text=True)  # fmt: skip
    if trial.returncode:
        return f"namespaces are refused here: {trial.stderr.strip()}"
    if shutil.which("slurmctld") and shutil.which("munged"):
        return ""
    if shutil.which("apt-get") is None:
        return "no slurmctld, and no apt-get to install it with"
    done = subprocess.run([str(SCRIPT), "install"], capture_output=True, text=True, timeout=600, check=False)
    return "" if done.returncode == 0 else f"slurm could not be installed: {done.stderr.strip().splitlines()[-1:]}"


class Cluster:
    """A running cluster in a folder of its own.

    `conf` and `partitions` are further lines of slurm.conf, `words` further words of the default partition.
    """

    def __init__(self, nodes: int = 4, gpus: int = 8, conf: str = "", partitions: str = "", words: str = "") -> None:
        # Not pytest's folder: munge wants one that everybody may enter.
        folder = Path(tempfile.mkdtemp(prefix="virtual-slurm-"))
        folder.chmod(0o755)
        self.folder, self.nodes = folder, [f"node{i:03d}" for i in range(1, nodes + 1)]
        self.bin = folder / "bin"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RA3_"))},
            "VC_DIR": str(folder), "VC_OWNER": str(os.getpid()),
            "VC_NODES": str(nodes), "VC_GPUS": str(gpus), "VC_EXTRA_CONF": conf,
            "VC_EXTRA_PARTS": partitions, "VC_GPU_PART": words, "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "PATH": f"{self.bin}:{os.environ['PATH']}:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1",
            # The login node has no slurmd; the fake nvidia-smi is found first on every node.
        }  # fmt: skip

    def script(self, *arguments: str, timeout: float = 300) -> str:
        """Run `cluster.sh ARGUMENTS`."""
        done = subprocess.run([str(SCRIPT), *arguments], env=self.env, capture_output=True, text=True, timeout=timeout,
                              check=False, cwd=ROOT)  # fmt: skip
        assert done.returncode == 0, f"cluster.sh {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def __enter__(self) -> "Cluster":
        (self.folder / "etc").mkdir()
        self.bin.mkdir()
        # Mounted before there are nodes, so that all of them see it.
        self.small_disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "small", str(self.small_disk)], check=True)
        self._build_pyxis()
        self._fake_nvidia_smi()
        try:
            self.script("start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.small_disk)], check=False)
        self.script("stop")

    def _build_pyxis(self) -> None:
        target = self.folder / "etc" / "fake_pyxis.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is not None and Path("/usr/include/slurm/spank.h").exists():
            subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(HERE / "fake_pyxis.c")], check=True)

    @property
    def has_pyxis(self) -> bool:
        return (self.folder / "etc" / "fake_pyxis.so").exists()

    def _fake_nvidia_smi(self) -> None:
        """Eight healthy GPUs, unless the node's fault file says otherwise."""
        program = self.bin / "nvidia-smi"
        program.write_text(
            "#!/bin/bash\n"
            f'fault="{self.folder}/fault.${{SLURMD_NODENAME:-$(hostname)}}"\n'
            '[[ -e $fault ]] && { cat "$fault"; exit 0; }\n'
            'for i in 0 1 2 3 4 5 6 7; do echo "$i, 0"; done\n'
        )
        program.chmod(0o755)

    def break_gpu(self, node: str) -> None:
        """From now on `nvidia-smi` of the node shows seven GPUs, one with memory errors."""
        (self.folder / f"fault.{node}").write_text("".join(f"{i}, {3 if i == 2 else 0}\n" for i in range(7)))

    def repair_gpu(self, node: str) -> None:
        (self.folder / f"fault.{node}").unlink(missing_ok=True)

    @property
    def small_disk(self) -> Path:
        """A file system that is full after 80 MB."""
        return self.folder / "small"

    # ---------------------------------------------------------------- commands on the login node

    def run(
        self, arguments: list[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return subprocess.run([str(SCRIPT), "exec", *arguments], env={**self.env, **(env or {})}, cwd=cwd, text=True,
                              capture_output=True, timeout=timeout, check=False)  # fmt: skip

    def output(self, arguments: list[str], **options: object) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(arguments, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """`scontrol show job`, the first line that is of this very job."""
        lines = self.output(["scontrol", "show", "job", "--oneliner", job]).splitlines()
        return dict(re.findall(r"(\S+?)=(\S*)", lines[0]))

    def state(self, job: str) -> str:
        """State of a job, or of each element of an array, put together."""
        lines = self.output(["scontrol", "show", "job", "--oneliner", job]).splitlines()
        return "/".join(sorted({dict(re.findall(r"(\S+?)=(\S*)", line))["JobState"] for line in lines}))

    def wait(self, what: Callable[[], object], seconds: float, why: str) -> None:
        """Until `what` is true."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"not within {seconds} s: {why}\n{self.run(['squeue']).stdout}"
            time.sleep(0.1)

    def wait_for_state(self, job: str, states: str, seconds: float = 400) -> str:
        """Until the job is in one of `states` (as a regular expression); returns it."""
        end, final = time.monotonic() + seconds, None
        while not re.fullmatch(states, state := self.state(job)):
            # A job that is just being requeued passes through one of these.
            final = (final or time.monotonic()) if state in FINAL else None
            over = (final and time.monotonic() > final + 5) or time.monotonic() > end
            assert not over, f"job {job} is {state}, not {states}: {self.facts(job)}"
            time.sleep(0.1)
        return state

    def cancel_all(self) -> None:
        """End what a test has left in the queue."""
        self.run(["scancel", "--me"])
        self.wait(lambda: not self.output(["squeue", "--noheader"]).strip(), 240, "queue empty")

    def leftovers(self) -> dict[str, list[str]]:
        """Processes on the nodes that belong to no daemon, by node; what a job must not leave behind."""
        found: dict[str, list[str]] = {}
        own = {}
        for node in self.nodes:
            init = self.folder / "run" / f"{node}.init"
            if init.exists():
                try:
                    own[os.readlink(f"/proc/{init.read_text().strip()}/ns/pid")] = node
                except OSError:
                    continue
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                spaces = list(_pid_namespaces(folder))
                node = next((own[space] for space in spaces if space in own), None)
                name, state = (folder / "comm").read_text().strip(), (folder / "stat").read_text().rpartition(")")[2]
            except OSError:
                continue
            if node and name not in DAEMONS and state.split()[0] != "Z":
                found.setdefault(node, []).append(name if spaces[0] in own else f"{name} {SANDBOXED}")
        return found


def _pid_namespaces(process: Path) -> Iterator[str]:
    """A process's own and those it is in: the judge's sandboxes have their own below a node's."""
    fd = os.open(process / "ns" / "pid", os.O_RDONLY)
    try:
        while True:
            yield os.readlink(f"/proc/self/fd/{fd}")
            try:
                outer = fcntl.ioctl(fd, NS_GET_PARENT)
            except OSError:
                return  # the outermost
            os.close(fd)
            fd = outer
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(why_not())
