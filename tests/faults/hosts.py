"""Two real hosts on this machine: network namespaces joined by a cable, each with its own sshd and its own /etc.

What comes in by ssh sees the processes of its host alone: `deepspeed` that is stopped has `pkill` end every DeepSpeed
launcher of the hosts, those of other tests too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.command import ROOT, environment

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
OWN_PROCESSES = ("--pid", "--fork", "--mount-proc")
INTERFACE = "cable"  # named alike in both, as GLOO_SOCKET_IFNAME is one name for all


def missing() -> str | None:
    """Why no hosts can be made here."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install iproute2 openssh-server pdsh)"
    tried = subprocess.run(
        ["unshare", "--net", *OWN_PROCESSES, "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Host:
    """name: also its host name; namespace: in which its processes live."""

    name: str
    namespace: str
    address: str

    def start(
        self, *command: str, out: Path | None = None, cwd: Path = ROOT
    ) -> subprocess.Popen[bytes]:
        """Start what a person types on the host, in a process group of its own."""
        with (out or Path(os.devnull)).open("ab") as output:
            env = environment() | {"PATH": f"{Path(sys.executable).parent}:{PATH}"}
            inside = ["ip", "netns", "exec", self.namespace, *command]
            return subprocess.Popen(
                inside, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True
            )

    def die(self) -> None:
        """As by a power cut: nothing more is sent, not even that connections are closed; all processes are gone."""
        run("ip", "-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill_all()

    def kill_all(self) -> None:
        for pid in run("ip", "netns", "pids", self.namespace).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts `one` and `two` that reach each other by ssh without a password."""
    mark = f"clue{os.getpid()}"
    hosts = Host("one", f"{mark}-one", "10.77.0.1"), Host("two", f"{mark}-two", "10.77.0.2")
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian makes it as its service starts
    for key in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    with ExitStack() as made:
        for host in hosts:
            run("ip", "netns", "add", host.namespace)
            made.callback(run, "ip", "netns", "delete", host.namespace)
            made.callback(host.kill_all)
            etc = Path("/etc/netns") / host.namespace  # what `ip netns exec` lays over /etc
            made.callback(shutil.rmtree, etc, ignore_errors=True)
            write_etc(etc, folder, hosts)
        ends = [f"{mark}a"[-15:], f"{mark}b"[-15:]]
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end in zip(hosts, ends, strict=True):
            run("ip", "link", "set", end, "netns", host.namespace, "name", INTERFACE)
            run(
                "ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE
            )
            for interface in (INTERFACE, "lo"):
                run("ip", "-n", host.namespace, "link", "set", interface, "up")
            sshd = (str(shutil.which("sshd", path=PATH)), "-D", "-e", "-f", "/etc/ssh/sshd_config")
            pid_file = ("-o", f"PidFile={folder}/{host.name}.pid")
            host.start(
                "unshare", *OWN_PROCESSES, *sshd, *pid_file, out=folder / f"sshd-{host.name}.log"
            )
        for host in hosts:
            await_ssh(hosts[0], host, folder)
        yield hosts


def write_etc(etc: Path, folder: Path, hosts: tuple[Host, ...]) -> None:
    (etc / "ssh").mkdir(parents=True)
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    authorized = folder / "authorized_keys"
    authorized.write_text((folder / "user.pub").read_text())
    (etc / "ssh" / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {authorized}\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nUsePAM no\n"
    )
    # The last two lines are those the README asks for: a host that is gone is noticed.
    (etc / "ssh" / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  StrictHostKeyChecking no\n  UserKnownHostsFile {folder}/known\n"
        "  LogLevel ERROR\n  ServerAliveInterval 5\n  ServerAliveCountMax 2\n"
    )


def await_ssh(start: Host, to: Host, folder: Path) -> None:
    deadline = time.monotonic() + 20
    while start.start("ssh", to.name, "true", out=folder / "ssh.log").wait() != 0:
        assert time.monotonic() < deadline, (folder / "ssh.log").read_text()[-1000:]
        time.sleep(0.2)


def run(*command: str) -> str:
    done = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
