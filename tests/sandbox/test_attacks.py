"""No attack is paid, and none harms the host or the sandbox."""

import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from attacks import ATTACKS, HELP, HONEST, TESTS, Attack
from paths import DOCS
from sandboxes import adopt_orphans, available, children, newcomers

from neuromas.sandbox import Limits, Outcome, Program, Sandbox, Status


@dataclass(frozen=True)
class Siege:
    """Outcomes of all attacks under one isolation, and what the host looked like before and after."""

    outcomes: dict[str, Outcome]
    honest: list[Outcome]
    before: dict[str, object]
    after: dict[str, object]
    connections: int
    survivors: list[str]


@pytest.fixture(scope="module", params=["bubblewrap", pytest.param("sandlock", marks=pytest.mark.slow)])
def siege(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Siege:
    if not available(request.param):
        pytest.skip(f"{request.param} does not work here")
    adopt_orphans()
    known = children()
    folder = tmp_path_factory.mktemp("host")
    canary = folder / "canary"
    canary.write_text("token-of-the-host")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        udp.bind(tcp.getsockname())
        unix.bind(str(folder / "socket"))
        for server in (tcp, unix):
            server.listen()
        facts = f"CANARY, FOLDER, SOCKET = {str(canary)!r}, {str(folder)!r}, {str(folder / 'socket')!r}\n"
        facts += f"PORT, PID = {tcp.getsockname()[1]}, {victim.pid}\n"
        before = look(folder, victim)
        with Sandbox(Limits(seconds=2.5), 2, request.param) as sandbox:
            attacks = [Program(facts + HELP + attack.source, attack.tests, "solve") for attack in ATTACKS]
            outcomes = sandbox.check(attacks)
        # On a busy machine the clock may stop an attack before the limit that is meant for it does: those get more time.
        early = [
            place
            for place, (attack, outcome) in enumerate(zip(ATTACKS, outcomes, strict=True))
            if outcome.status is Status.TIMEOUT and Status.TIMEOUT not in attack.status
        ]
        with Sandbox(Limits(seconds=30), 2, request.param) as sandbox:
            for place, outcome in zip(early, sandbox.check([attacks[place] for place in early]), strict=True):
                outcomes[place] = outcome
            honest = sandbox.check([Program(facts + HELP + HONEST, TESTS, "solve")] * 4)
        after = look(folder, victim)
        connections = sum(map(has_visitor, (tcp, udp, unix)))
    victim.kill()
    victim.wait()
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    return Siege(dict(zip(names, outcomes, strict=True)), honest, before, after, connections, newcomers(known, reap=False))


def look(folder: Path, victim: subprocess.Popen[bytes]) -> dict[str, object]:
    """Describe everything an attack was aimed at; reading the canary does not change its times of change."""
    files = {path.name: path.stat() for path in sorted(folder.iterdir())}
    seen: dict[str, object] = {
        name: (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_size, stat.st_nlink, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, stat in files.items()
    }
    strays = [name for name in ("/tmp/neuromas-attack", "/tmp/neuromas-link", "here") if Path(name).exists()]
    return seen | {"canary text": (folder / "canary").read_text(), "victim": victim.poll(), "strays": strays}


def has_visitor(server: socket.socket) -> bool:
    server.setblocking(False)
    try:
        server.recv(1) if server.type is socket.SOCK_DGRAM else server.accept()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_attack_scores_nothing(siege: Siege, attack: Attack) -> None:
    outcome = siege.outcomes[attack.name]
    assert not outcome.passed
    assert outcome.status in attack.status, outcome
    assert re.search(attack.detail, outcome.detail), outcome
    assert "token-of-the-host" not in outcome.detail


def test_attacks_leave_the_host_and_the_sandbox_as_they_were(siege: Siege) -> None:
    assert siege.after == siege.before
    assert siege.before["victim"] is None
    assert siege.connections == 0
    assert siege.survivors == []
    assert [outcome.detail for outcome in siege.honest] == [""] * 4


def test_page_lists_every_attack() -> None:
    page = (DOCS / "sandbox.md").read_text()
    assert len(ATTACKS) >= 30
    assert [attack.name for attack in ATTACKS if f"| {attack.name} |" not in page] == []
    assert re.findall(r"\*\*(\d+) attacks\*\*", page) == [str(len(ATTACKS))]
