"""serve.launch: the plan, the wait, the signals, and the error dug out of a log. The server here is
a small program that behaves as vllm does; tests/serve starts the real one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.launch import main, make_plan, pick_profile, start
from serve.server_log import epitaph, find_error

FAKE = """\
#!{python}
import http.server, os, signal, sys, time
print("starting", sys.argv[1:], flush=True)
if os.environ.get("FAKE") == "die":
    print("(Worker pid=7) ERROR 11-23 20:19:38 [base.py:478] Traceback (most recent call last):")
    print("(Worker pid=7) ERROR 11-23 20:19:38 [base.py:478]   File 'talker.py', line 5, in load")
    print("(Worker pid=7) ERROR 11-23 20:19:38 [base.py:478] RuntimeError: 1 keys missing: ['x']")
    print("(APIServer pid=6) RuntimeError: Engine core initialization failed. See above.")
    sys.exit(3)
if os.environ.get("FAKE") == "hang":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def vllm(tmp_path) -> str:
    path = tmp_path / "vllm"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def export_dir(tmp_path) -> Path:
    out = tmp_path / "my export"
    (out / "deploy").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "deploy" / "cpu_smoke.yaml").write_text("stages: []\n")
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plan_of(export_dir, vllm, **options):
    options = {"device": "cpu", "port": free_port(), "state": export_dir.parent / "state"} | options
    return make_plan(export_dir, vllm=vllm, **options)


def test_plan_sets_what_the_engine_needs(export_dir, vllm):
    plan = plan_of(export_dir, vllm, extra=["--max-log-len", "20"])
    assert plan.env["HIGGS_AUDIO_TOKENIZER_PATH"] == str(export_dir / "audio_tokenizer")
    assert plan.env["VLLM_USE_DEEP_GEMM"] == "0" and plan.env["HF_HUB_OFFLINE"] == "1"
    assert plan.env["SPEAKER_SAMPLES_DIR"].startswith(str(export_dir.parent / "state"))
    words = plan.command
    assert words[:3] == [vllm, "serve", str(export_dir)] and "--omni" in words
    deploy = words[words.index("--deploy-config") + 1]
    assert deploy == str(export_dir / "deploy" / "cpu_smoke.yaml")  # the export's own comes first
    assert words[words.index("--host") + 1] == "127.0.0.1" and plan.api_key is None
    assert words[-2:] == ["--max-log-len", "20"]


def test_nothing_is_fetched_and_voices_are_few_and_stay(export_dir, vllm, tmp_path, monkeypatch):
    """Unless asked for: the engine alone would fetch any URL and let anybody replace a voice."""
    plan = plan_of(export_dir, vllm)
    words = plan.command
    assert words[words.index("--allowed-media-domains") + 1] == "none.invalid"
    assert "--allowed-local-media-path" not in words  # vLLM's own default is none
    assert plan.env["SPEAKER_MAX_UPLOADED"] == "100"
    assert plan.env["VLLM_OMNI_SPEAKER_REGISTRATION_POLICY"] == "immutable"
    monkeypatch.setenv("SPEAKER_MAX_UPLOADED", "7")  # the operator's word counts
    options = {"local_files": tmp_path, "media_domains": ["a.example", "b.example"]}
    plan = plan_of(export_dir, vllm, extra=["--seed", "1"], **options)
    assert plan.env["SPEAKER_MAX_UPLOADED"] == "7"
    shown = " ".join(plan.command)
    assert "--allowed-media-domains a.example b.example --" in shown
    assert f"--allowed-local-media-path {tmp_path.resolve()}" in shown
    with pytest.raises(FileNotFoundError, match="no folder"):
        plan_of(export_dir, vllm, local_files=tmp_path / "nowhere")


def test_a_key_is_made_up_when_others_can_reach_the_server(export_dir, vllm, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    plan = plan_of(export_dir, vllm, host="0.0.0.0")
    assert len(plan.api_key) > 20 and plan.env["VLLM_API_KEY"] == plan.api_key
    assert plan.api_key not in plan.show() and plan.api_key not in " ".join(plan.command)
    assert plan.url.startswith("http://127.0.0.1:")
    assert plan_of(export_dir, vllm, host="0.0.0.0", api_key="mine").api_key == "mine"


def test_shown_command_is_a_shell_line(export_dir, vllm):
    words = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + plan_of(export_dir, vllm).show()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert str(export_dir) in words and "-u" in words


@pytest.mark.parametrize(
    "gpus, profile",
    [([], "cpu_smoke"), ([24.0], "small_gpu"), ([80.0], "throughput"), ([80.0, 80.0], "two_gpu")],
)
def test_profile_for_the_gpus_found(gpus, profile):
    assert pick_profile(gpus) == profile


def test_missing_things_are_named(export_dir, vllm, tmp_path):
    with pytest.raises(FileNotFoundError, match="serve.export"):
        plan_of(tmp_path / "nothing", vllm)
    with pytest.raises(FileNotFoundError, match="throughput"):
        plan_of(export_dir, vllm, profile="fastest")
    with pytest.raises(FileNotFoundError, match="--vllm"):
        plan_of(export_dir, str(tmp_path / "no-vllm"))


def test_waits_until_ready_and_stops_everything(export_dir, vllm):
    plan = plan_of(export_dir, vllm)
    with start(plan) as server:
        assert server.wait_ready(30, progress=False) < 30
        pid = server.process.pid
    assert server.process.returncode == 5
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_dead_server_is_explained_by_its_workers_error(export_dir, vllm):
    plan = plan_of(export_dir, vllm)
    with start(plan, {"FAKE": "die"}) as server:
        with pytest.raises(RuntimeError) as caught:
            server.wait_ready(30, progress=False)
    message = str(caught.value)
    assert "exit code 3" in message and "RuntimeError: 1 keys missing: ['x']" in message
    assert "talker.py" in message and str(plan.log) in message
    assert "initialization failed" not in message


def test_a_server_that_never_answers_is_given_up(export_dir, vllm):
    with start(plan_of(export_dir, vllm), {"FAKE": "hang"}) as server:
        with pytest.raises(TimeoutError, match="no answer"):
            server.wait_ready(1.5, progress=False)
    assert server.process.returncode is not None


def test_error_without_an_exception_shows_the_last_lines():
    assert find_error("one\n\ntwo\nKilled\n") == "one\ntwo\nKilled"


def test_death_of_a_server_that_was_up_is_explained():
    assert epitaph(0, "") is None
    assert "killed by SIGKILL" in epitaph(-9, "ValueError: of a request long ago")
    assert "memory" in epitaph(-9, "") and "memory" not in epitaph(-11, "")
    assert epitaph(3, "Traceback\nOSError: disk is full\n").endswith("OSError: disk is full")


def test_first_cause_not_its_consequences():
    log = (
        "(StageEngineCoreProc_stage0 pid=9) \x1b[31mERROR\x1b[0m 11-23 20:19:38 [core.py:1] "
        "ValueError: Unexpected checkpoint key with no known mapping: 'lora'\n"
        "(APIServer pid=6) RuntimeError: Orchestrator initialization failed: Engine core is gone\n"
    )
    assert find_error(log).startswith("ValueError: Unexpected checkpoint key")


def run_cli(*words: str, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "serve.launch", *words],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_signals_reach_the_server_and_its_exit_code_comes_back(export_dir, vllm, tmp_path):
    words = [str(export_dir), "--device", "cpu", "--vllm", vllm, "--port", str(free_port())]
    child = run_cli(*words, "--no-check", "--state", str(tmp_path / "state"))
    seen = ""
    deadline = time.monotonic() + 60
    while "ready after" not in seen and time.monotonic() < deadline:
        seen += child.stdout.readline()
    assert "ready after" in seen
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 5
    assert "serve.client" in seen + child.stdout.read()


def test_a_server_that_is_killed_later_is_mourned(export_dir, vllm, tmp_path):
    words = [str(export_dir), "--device", "cpu", "--vllm", vllm, "--port", str(free_port())]
    child = run_cli(*words, "--no-check", "--state", str(tmp_path / "state"))
    while "ready after" not in child.stdout.readline():
        assert child.poll() is None
    server = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0]
    os.kill(int(server), signal.SIGKILL)
    assert child.wait(30) == 128 + 9
    assert "killed by SIGKILL" in child.stdout.read()


def test_print_only_prints(export_dir, vllm, tmp_path):
    child = run_cli(str(export_dir), "--print", "--device", "cpu", "--vllm", vllm)
    assert child.wait(60) == 0
    assert "--deploy-config" in child.stdout.read()


def test_a_bad_export_is_not_even_started(export_dir, vllm, monkeypatch, capsys):
    argv = ["launch", str(export_dir), "--device", "cpu", "--vllm", vllm]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    out = f"{said.out} {said.err} {ended.value.code}"
    assert ended.value.code not in (0, None)
    assert "missing: tokenizer.json" in out and "starting [" not in out
