"""Two real hosts on this machine: network namespaces joined by a cable, each with its own sshd.

Each has its own /etc, too. Whoever comes in by ssh sees the processes of that host alone: when
`deepspeed` is stopped it has `pkill` end every DeepSpeed launcher of the hosts, and would end those
of other tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.command import ROOT, environment

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
DEBIAN_PACKAGES = "iproute2 openssh-server pdsh"
OWN_PROCESSES = ("--pid", "--fork", "--mount-proc")
INTERFACE = "cable"  # has one name on both hosts, as GLOO_SOCKET_IFNAME names it for both


def explain_missing_hosts() -> str | None:
    """Explain why no hosts can be made here, if so."""
    if os.geteuid() != 0:
        return "needs root: network namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: apt-get install {DEBIAN_PACKAGES})"
    trial = subprocess.run(
        ["unshare", "--net", *OWN_PROCESSES, "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else None


@dataclass(frozen=True)
class Host:
    """One of the two hosts."""

    name: str  # also its host name
    namespace: str  # the network namespace in which its processes live
    address: str

    def start_command(
        self, *command: str, output: Path | None = None, folder: Path = ROOT
    ) -> subprocess.Popen[bytes]:
        """Start what a person types on the host, in a process group of its own."""
        inside = ["ip", "netns", "exec", self.namespace, *command]
        with (output or Path(os.devnull)).open("ab") as file:
            return subprocess.Popen(
                inside,
                cwd=folder,
                env=environment() | {"PATH": f"{Path(sys.executable).parent}:{PATH}"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def cut_power(self) -> None:
        """End all processes at once; nothing is sent any more, not even that connections end."""
        run_command("ip", "-n", self.namespace, "link", "set", INTERFACE, "down")
        self.kill_processes()

    def kill_processes(self) -> None:
        for process in run_command("ip", "netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@contextmanager
def open_two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Make hosts `one` and `two`, which reach each other by ssh without a password."""
    mark = f"clue{os.getpid()}"
    hosts = Host("one", f"{mark}-one", "10.77.0.1"), Host("two", f"{mark}-two", "10.77.0.2")
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian makes it when its service starts
    for key in ("host", "user"):
        run_command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    with ExitStack() as stack:
        for host in hosts:
            run_command("ip", "netns", "add", host.namespace)
            stack.callback(run_command, "ip", "netns", "delete", host.namespace)
            stack.callback(host.kill_processes)
            etc = Path("/etc/netns") / host.namespace  # what `ip netns exec` lays over /etc
            stack.callback(shutil.rmtree, etc, ignore_errors=True)
            write_etc(etc, folder, hosts)
        lay_cable(mark, hosts)
        for host in hosts:
            start_ssh_server(host, folder)
        for host in hosts:
            await_ssh(hosts[0], host, folder)
        yield hosts


def lay_cable(mark: str, hosts: tuple[Host, Host]) -> None:
    """Join the hosts by a pair of interfaces, and give them their addresses."""
    ends = [f"{mark}a"[-15:], f"{mark}b"[-15:]]  # names of interfaces have 15 letters at most
    run_command("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for host, end in zip(hosts, ends, strict=True):
        inside = ("ip", "-n", host.namespace)
        run_command("ip", "link", "set", end, "netns", host.namespace, "name", INTERFACE)
        run_command(*inside, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in (INTERFACE, "lo"):
            run_command(*inside, "link", "set", interface, "up")


def start_ssh_server(host: Host, folder: Path) -> None:
    """Start sshd so that whoever comes in sees the processes of that host alone."""
    server = (str(shutil.which("sshd", path=PATH)), "-D", "-e", "-f", "/etc/ssh/sshd_config")
    process_file = ("-o", f"PidFile={folder}/{host.name}.pid")
    output = folder / f"sshd-{host.name}.log"
    host.start_command("unshare", *OWN_PROCESSES, *server, *process_file, output=output)


def write_etc(etc: Path, folder: Path, hosts: tuple[Host, Host]) -> None:
    """Write the hosts' names and how they reach each other by ssh."""
    (etc / "ssh").mkdir(parents=True)
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    authorized = folder / "authorized_keys"
    authorized.write_text((folder / "user.pub").read_text())
    (etc / "ssh" / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {authorized}\n"
        "StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\n"
    )
    # The docs ask for the last two lines, by which a host that is gone is noticed.
    (etc / "ssh" / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  UserKnownHostsFile {folder}/known\n"
        "  StrictHostKeyChecking no\n  LogLevel ERROR\n"
        "  ServerAliveInterval 5\n  ServerAliveCountMax 2\n"
    )


def await_ssh(start: Host, goal: Host, folder: Path) -> None:
    """Wait until one host reaches another by ssh."""
    deadline, output = time.monotonic() + 20, folder / "ssh.log"
    while start.start_command("ssh", goal.name, "true", output=output).wait() != 0:
        assert time.monotonic() < deadline, output.read_text()[-1000:]
        time.sleep(0.2)


def run_command(*command: str) -> str:
    """Run a command that must succeed. Returns what it printed."""
    done = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
