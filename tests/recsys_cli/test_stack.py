"""The local stack with a real Redis and real child processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from rich.console import Console
from waiting import eventually

from recsys_cli import stack
from recsys_cli.child import is_alive
from recsys_cli.processes import StackError, free_port, home_lock, kept_command, pid_file, running
from recsys_core.settings import load_settings

KEEPS_REDIS = """
import sys, time, pathlib
from recsys_cli.stack import redis_server
with redis_server(pathlib.Path(sys.argv[1])):
    time.sleep(600)
"""

KEEPS_A_SMALL_STACK = """
import pathlib, sys
from rich.console import Console
from recsys_cli import stack
from recsys_cli.java import JavaHome
from recsys_core.settings import load_settings
home = pathlib.Path(sys.argv[1])
whole_plan = stack.plan
def small_plan(settings, console):
    services, environment = whole_plan(settings, console)
    services = [s for s in services if s.name in ("redis", "webserver")]
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    web = stack.Service("webserver", ["sh", "-c", f"{sys.executable} -c '{stubborn}' & wait"], services[1].where)
    (stack.run_folder(home) / "broker.address").write_text("127.0.0.1:1")
    return [services[0], web], environment
stack.plan = small_plan
stack.ensure_java = lambda: JavaHome(pathlib.Path("/nowhere"), 17)
try:
    sys.exit(stack.up(load_settings(home, redis={"url": "redis://127.0.0.1:0"}), Console()))
except stack.StackError as error:
    sys.exit(str(error))
"""


LAST_WORDS = """
import pathlib, signal, sys, time
from recsys_cli.stack import redis_answers
def end(*_):
    time.sleep(1.0)
    pathlib.Path(sys.argv[1], "last-words").write_text(f"redis answers: {redis_answers(sys.argv[2])}")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("\\x1b[31mready\\x1b[0m", flush=True)
time.sleep(600)
"""
KEEPS_A_USER_OF_REDIS = f"""
import pathlib, sys
from rich.console import Console
from recsys_cli import stack
from recsys_cli.java import JavaHome
from recsys_core.settings import load_settings
home = pathlib.Path(sys.argv[1])
whole_plan = stack.plan
def small_plan(settings, console):
    services, environment = whole_plan(settings, console)
    kept = [s for s in services if s.name in ("redis", "webserver")]
    (stack.run_folder(home) / "broker.address").write_text("127.0.0.1:1")
    user = [sys.executable, "-c", {LAST_WORDS!r}, str(home), kept[0].where]
    return [kept[0], stack.Service("webserver", user, kept[1].where)], environment
stack.plan = small_plan
stack.ensure_java = lambda: JavaHome(pathlib.Path("/nowhere"), 17)
sys.exit(stack.up(load_settings(home, redis={{"url": "redis://127.0.0.1:0"}}), Console()))
"""


def start(program: str, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pids_of(home: Path, *names: str) -> list[int]:
    """Of the processes whose pid files are there. A part that ends takes its file away, perhaps between two looks at it."""
    found: list[str] = []

    def read() -> bool:
        found[:] = []
        with contextlib.suppress(FileNotFoundError):
            found.extend(pid_file(home, name).read_text() for name in names)
        return len(found) == len(names) and all(found)

    eventually(read)
    return [int(pid) for pid in found]


def processes_of(home: Path) -> list[str]:
    """Processes whose command line names the home."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(home) in line and f"{os.getpid()} " not in line]


def test_redis_answers_while_the_block_runs_and_is_gone_after_it(tmp_path: Path) -> None:
    with stack.redis_server(tmp_path) as url:
        client = redis.Redis.from_url(url)
        assert client.set("a", "1")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "volatile-lru"
        assert client.config_get("bind")["bind"] == "127.0.0.1"
    assert not stack.redis_answers(url)
    assert processes_of(tmp_path) == []


def test_redis_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    with stack.redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.set("recs:{u1}", b"answer", ex=1000)
    with stack.redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert client.get("recs:{u1}") == b"answer"
        assert 0 < client.ttl("recs:{u1}") <= 1000


def test_redis_stops_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), stack.redis_server(tmp_path) as url:
        _ = 1 / 0
    assert not stack.redis_answers(url)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_redis_stops_when_its_parent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    parent = start(KEEPS_REDIS, tmp_path)
    (pid,) = pids_of(tmp_path, "redis")
    os.kill(parent.pid, number)  # not waited for: a zombie parent is gone as well
    eventually(lambda: not is_alive(pid))
    eventually(lambda: processes_of(tmp_path) == [])
    parent.communicate()


def test_a_child_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    with running("talker", tmp_path, ["sh", "-c", "echo last words; exit 3"]) as check:
        with pytest.raises(StackError, match=r"talker ended with exit code 3(.|\n)*last words"):
            eventually(lambda: bool(check()))


def test_a_childs_own_children_end_with_it(tmp_path: Path) -> None:
    with running("family", tmp_path, ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/grandchild; wait"]):
        eventually(lambda: (tmp_path / "grandchild").is_file() and bool((tmp_path / "grandchild").read_text()))
        grandchild = int((tmp_path / "grandchild").read_text())
        assert is_alive(grandchild)
    assert not is_alive(grandchild)


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert free_port(taken) not in (0, taken)
    assert free_port(taken) == taken


def test_every_port_of_a_stack_is_replaced_when_it_is_taken_and_given_once(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    with contextlib.ExitStack() as held:
        taken = [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        settings = load_settings(
            tmp_path,
            serving={"metrics_port": taken[0], "health_port": taken[1]},
            stream={"metrics_port": taken[0]},
            dagster={"port": taken[2]},
        )
        _, environment = stack.plan(settings, console)
    names = ["SERVING__PORT", "SERVING__METRICS_PORT", "SERVING__HEALTH_PORT", "STREAM__METRICS_PORT"]
    given = [int(environment[f"RECSYS_{name}"]) for name in names]
    assert len({*given, *taken}) == len(given) + len(taken)
    told = shown.getvalue()
    for port, name in zip(
        [taken[0], taken[0], *taken[1:]], ["serving", "stream", "health of serving", "webserver"], strict=True
    ):
        assert f"port {port} is taken; " in told
        assert f"{name} gets " in told


def test_a_port_that_two_parts_want_goes_to_the_first(tmp_path: Path) -> None:
    port = free_port()
    settings = load_settings(tmp_path, serving={"metrics_port": port}, stream={"metrics_port": port})
    _, environment = stack.plan(settings, Console(quiet=True))
    assert environment["RECSYS_SERVING__METRICS_PORT"] == str(port)
    assert environment["RECSYS_STREAM__METRICS_PORT"] not in ("0", str(port))


def test_a_stack_without_metrics_opens_no_port_for_them(tmp_path: Path) -> None:
    _, environment = stack.plan(load_settings(tmp_path), Console(quiet=True))
    assert not [name for name in environment if name.endswith("METRICS_PORT")]


def test_the_second_stack_of_a_home_is_told_who_runs(tmp_path: Path) -> None:
    with home_lock(tmp_path):
        with pytest.raises(StackError, match=f"in use by pid {os.getpid()}"), home_lock(tmp_path):
            pass
    with home_lock(tmp_path):
        pass


def test_two_homes_run_at_once_on_own_ports(tmp_path: Path) -> None:
    with stack.redis_server(tmp_path / "one") as one, stack.redis_server(tmp_path / "two") as two:
        assert one != two
        assert stack.redis_answers(one)
        assert stack.redis_answers(two)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_whole_stack(tmp_path: Path, number: signal.Signals, code: int) -> None:
    up = start(KEEPS_A_SMALL_STACK, tmp_path)
    pids_of(tmp_path, "redis", "webserver")
    up.send_signal(number)
    output, _ = up.communicate(timeout=30)
    assert up.returncode == code, output
    assert processes_of(tmp_path) == []
    assert not (tmp_path / "run" / "stack.json").exists()


def test_a_killed_stack_leaves_no_process(tmp_path: Path) -> None:
    up = start(KEEPS_A_SMALL_STACK, tmp_path)
    pids = pids_of(tmp_path, "redis", "webserver")
    up.kill()
    eventually(lambda: not any(is_alive(pid) for pid in pids))
    eventually(lambda: processes_of(tmp_path) == [])
    up.communicate()
    assert stack.running_services(tmp_path) == []


def test_a_part_that_is_killed_is_started_again(tmp_path: Path) -> None:
    up = start(KEEPS_A_SMALL_STACK, tmp_path)
    first, web = pids_of(tmp_path, "redis", "webserver")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: pids_of(tmp_path, "redis") != [first])
    eventually(lambda: bool(stack.running_services(tmp_path)))
    [where] = [service.where for service in stack.running_services(tmp_path) if service.name == "redis"]
    eventually(lambda: stack.redis_answers(where))
    assert pids_of(tmp_path, "webserver") == [web]
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=30)
    assert processes_of(tmp_path) == []


def test_when_one_part_keeps_ending_the_stack_stops_and_names_it(tmp_path: Path) -> None:
    up = start(KEEPS_A_SMALL_STACK, tmp_path)
    killed: set[int] = set()
    pids_of(tmp_path, "redis", "webserver")
    while len(killed) <= stack.RESTARTS:
        eventually(lambda: set(pids_of(tmp_path, "redis")).isdisjoint(killed))
        [pid] = pids_of(tmp_path, "redis")
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
    output, _ = up.communicate(timeout=30)
    assert up.returncode == 1
    assert "redis ended with exit code 137, so the whole stack was stopped" in output
    assert processes_of(tmp_path) == []


def test_status_asks_each_part(tmp_path: Path) -> None:
    up = start(KEEPS_A_SMALL_STACK, tmp_path)
    try:
        pids_of(tmp_path, "redis", "webserver")
        eventually(lambda: bool(stack.running_services(tmp_path)))
        console = Console(record=True, width=160, quiet=True)
        services = {service.name: service for service in stack.running_services(tmp_path)}
        eventually(lambda: not stack.check(services["redis"], os.getpid()))
        assert stack.check(services["webserver"], os.getpid()) == "starting or not answering"
        assert stack.check(services["redis"], None) == "down"
        assert stack.status(load_settings(tmp_path), console) == 1
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=30)


def test_status_of_an_idle_home_says_how_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stack.status(load_settings(tmp_path), Console()) == 1
    assert "start it with `recsys up`" in capsys.readouterr().out


def test_the_dagster_home_has_the_projects_instance_and_keeps_an_own_one(tmp_path: Path) -> None:
    folder = stack.prepare_dagster_home(tmp_path)
    assert (folder / "dagster.yaml").samefile(stack.PROJECT / "dagster.yaml")
    (folder / "dagster.yaml").unlink()
    (folder / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    stack.prepare_dagster_home(tmp_path)
    assert not (folder / "dagster.yaml").is_symlink()


def test_the_dagster_instance_runs_one_spark_at_a_time_and_reports_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    monkeypatch.setenv("DAGSTER_HOME", str(stack.prepare_dagster_home(tmp_path)))
    with dg.DagsterInstance.get() as instance:
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1
        queue = instance.get_concurrency_config().run_queue_config
        assert (queue.max_concurrent_runs, queue.tag_concurrency_limits[0]["key"]) == (4, "recsys/work")
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
    assert (tmp_path / "dagster" / "history").is_dir()


def test_a_server_without_a_release_is_up_but_not_serving(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="serving was not ready"):
        with stack.serving_process(tmp_path, {"RECSYS_REDIS__URL": "redis://127.0.0.1:1/0"}, free_port(), seconds=4):
            pass
    assert processes_of(tmp_path) == []


def test_a_server_that_can_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"serving ended with exit code 2(.|\n)*there is no such setting"):
        with stack.serving_process(tmp_path, {"RECSYS_ALS__RNAK": "1"}):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_redis_goes_after_those_who_write_to_it_at_their_end(tmp_path: Path, number: signal.Signals) -> None:
    running_stack = start(KEEPS_A_USER_OF_REDIS, tmp_path)
    pids_of(tmp_path, "redis", "webserver")
    assert running_stack.stdout is not None
    seen = []
    while not any("ready" in line for line in seen):
        seen.append(running_stack.stdout.readline())
    os.kill(running_stack.pid, number)
    rest, _ = running_stack.communicate(timeout=20)
    assert (tmp_path / "last-words").read_text() == "redis answers: True"
    assert "\x1b" not in "".join(seen) + rest, "colours are for terminals"
    assert processes_of(tmp_path) == []


def test_the_broker_is_to_listen_where_the_settings_look_for_it(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, kafka={"bootstrap_servers": "127.0.0.1:53155,127.0.0.1:53156"})
    services, _ = stack.plan(settings, Console())
    command = next(service.command for service in services if service.name == "broker")
    assert command[command.index("--port") + 1] == "53155"


def test_status_says_where_metrics_are_and_how_a_release_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(tmp_path, serving={"metrics_port": 53152})
    services, _ = stack.plan(settings, Console())
    serving = next(service for service in services if service.name == "serving")
    assert serving.metrics == "127.0.0.1:53152"
    monkeypatch.setattr(stack, "running_services", lambda _: [serving])
    monkeypatch.setattr(stack, "check", lambda *_: stack.NO_RELEASE)
    console = Console(record=True, width=80)
    assert stack.status(settings, console) == 1
    shown = console.export_text()
    assert "metrics 127.0.0.1:53152" in shown
    assert "nightly" in shown


def test_a_worker_follows_a_broker_that_comes_back_elsewhere(tmp_path: Path) -> None:
    address, said = tmp_path / "broker.address", tmp_path / "said"
    program = "import os, sys, time; print(os.environ['BROKER'], file=open(sys.argv[1], 'a'), flush=True); time.sleep(600)"
    command = kept_command("stream", tmp_path, [sys.executable, "-c", program, str(said)], ("BROKER", address), follow=True)
    said.touch()
    keeper = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for where in (["127.0.0.1:1"], ["127.0.0.1:1", "127.0.0.1:2"]):
            address.write_text(f"{where[-1]}\n")
            eventually(lambda where=where: said.read_text().split() == where)
            address.unlink()
        worker = int(pid_file(tmp_path, "stream").read_text())
        assert is_alive(worker)
    finally:
        keeper.terminate()
        keeper.wait(20)
    assert not is_alive(worker)
