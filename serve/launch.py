"""`python -m serve.launch EXPORT`: start vLLM-Omni on an export, as safely as it can be started.

    python -m serve.launch exports/x                  # picks a profile for the GPUs found
    python -m serve.launch exports/x --device cpu     # the nano checkpoint on a laptop
    python -m serve.launch exports/x --print          # only says what it would run
    python -m serve.launch exports/x --lora ann=runs/ann --lora bob=runs/bob  # voices by name

Checks the export first, prints the command and the environment, waits until the server answers and
says how to call it. SIGINT and SIGTERM reach the server; its exit code is returned; if it dies, the
error that killed it is dug out of its log.

Safe unless told otherwise: it listens on this machine only; on another --host an API key is made up
unless VLLM_API_KEY or --api-key gives one. References come inside the request: no files of this
machine (--local-files FOLDER), nothing fetched from the network (--media-domains HOST ...).
Uploaded voices: 100 at most, none overwritten (SPEAKER_MAX_UPLOADED,
VLLM_OMNI_SPEAKER_REGISTRATION_POLICY).
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from serve.client import is_healthy
from serve.server_log import epitaph, find_error, last_line

PROFILES = Path(__file__).parent / "profiles"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
STATE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "higgs_lab" / "serve"

# What strangers may make the server do, unless the environment says otherwise.
LIMITS = {
    # An upload may have 10 MB (fixed in serving_speech.py); the engine's own limit of 1000 voices
    # would let anybody with a key fill 10 GB of disk.
    "SPEAKER_MAX_UPLOADED": "100",
    # The engine lets any caller replace a voice that another uploaded, and so speak in its name.
    "VLLM_OMNI_SPEAKER_REGISTRATION_POLICY": "immutable",
    # For references by URL, where --media-domains allows any: a 30 s reference is below 9 MB (the
    # engine takes 256), and a redirect could lead past the list of allowed hosts.
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "16",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
}
# vLLM reads an empty list of hosts as "any": whoever can call the server could then make it fetch
# from the network that it stands in. This name is reserved never to exist (RFC 2606).
NO_HOST = "none.invalid"


@dataclass(frozen=True)
class Plan:
    """What will be run."""

    command: list[str]
    env: dict[str, str]  # set on top of the present environment
    unset: list[str]
    url: str
    log: Path
    deploy: Path
    api_key: str | None = None
    model: str = ""

    def show(self) -> str:
        """The command as a shell line, its environment in front; the key is not shown."""
        hidden = {k: "***" if k == "VLLM_API_KEY" else v for k, v in self.env.items()}
        words = [f"{k}={shlex.quote(v)}" for k, v in sorted(hidden.items())]
        clear = [f"-u {name}" for name in self.unset]
        return " \\\n  ".join([" ".join(["env", *clear]), *words, shlex.join(self.command)])


@dataclass
class Server:
    """A running server; leave the `with` block to stop it."""

    plan: Plan
    process: subprocess.Popen
    started: float = field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        return self.plan.url

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def wait_ready(self, timeout_sec: float = 600.0, progress: bool = True) -> float:
        """Wait for /health; returns the seconds since the start.

        Raises RuntimeError with the server's own error when it dies, TimeoutError when it does not
        come up.
        """
        shown = 0.0
        while not is_healthy(self.url, timeout_sec=2):
            elapsed = time.monotonic() - self.started
            if (code := self.process.poll()) is not None:
                raise RuntimeError(
                    f"the server ended with exit code {code} after {elapsed:.0f} s:\n"
                    f"{find_error(self.log_text())}\nThe whole log: {self.plan.log}"
                )
            if elapsed > timeout_sec:
                raise TimeoutError(f"no answer after {elapsed:.0f} s; see {self.plan.log}")
            if progress and elapsed - shown >= 5:
                shown = elapsed
                print(f"starting, {elapsed:.0f} s: {last_line(self.log_text())}", file=sys.stderr)
            time.sleep(0.5)
        return time.monotonic() - self.started

    def log_text(self) -> str:
        return self.plan.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, timeout_sec: float = 60.0) -> int:
        """SIGTERM, then SIGKILL to the server and its workers; returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_sec)
            except subprocess.TimeoutExpired:
                pass
        try:  # workers that outlived it; the server leads a session of its own
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.process.wait()


def make_plan(
    export: str | Path,
    profile: str | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    vllm: str | None = None,
    log: str | Path | None = None,
    state: str | Path | None = None,
    extra: list[str] | None = None,
    local_files: str | Path | None = None,
    media_domains: list[str] | None = None,
) -> Plan:
    """Command and environment for an export; `profile` is a name or a YAML file.

    local_files: folder from which references may come as file:// URLs; default none.
    media_domains: hosts from which they may be fetched; default none.

    Raises FileNotFoundError when the export, the profile or vLLM is not there.
    """
    export = Path(export).resolve()
    if not (export / "config.json").is_file():
        raise FileNotFoundError(f"{export} is no checkpoint: make one with python -m serve.export")
    gpus = [] if device == "cpu" else gpu_memory_gb()
    if device == "cuda" and not gpus:
        raise FileNotFoundError("no GPU answers to nvidia-smi; --device cpu serves small models")
    cpu = not gpus
    deploy = _profile_file(export, profile or pick_profile(gpus))
    state = Path(state or STATE)
    key = api_key or os.environ.get("VLLM_API_KEY")
    if key is None and host not in LOOPBACK:
        key = secrets.token_urlsafe(24)
    env = {
        # The engine's clone encoder; it would download one otherwise and ignore the bundled one.
        "HIGGS_AUDIO_TOKENIZER_PATH": str(export / "audio_tokenizer"),
        # Uploaded voices and caches in one place instead of three.
        "SPEAKER_SAMPLES_DIR": str(state / "speakers"),
        "VLLM_CACHE_ROOT": str(state / "vllm"),
        # The engine's README for this model: not validated with DeepGEMM.
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_MOE_USE_DEEP_GEMM": "0",
        # Everything is in the export: nothing is fetched, nothing reported.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    env |= {name: os.environ.get(name, value) for name, value in LIMITS.items()}
    if cpu:
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a quarter of the machine
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding starves the second stage on few cores
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # two large processes less, the same answers
        }
    if key:
        env["VLLM_API_KEY"] = key  # not on the command line, which every user of the machine sees
    command = [_vllm(vllm, cpu), "serve", str(export), "--omni", "--trust-remote-code"]
    command += ["--deploy-config", str(deploy), "--host", host, "--port", str(port)]
    command += ["--allowed-media-domains", *(media_domains or [NO_HOST])]
    command += ["--served-model-name", export.name]
    if local_files is not None:
        if not Path(local_files).is_dir():
            raise FileNotFoundError(f"--local-files {local_files} is no folder")
        command += ["--allowed-local-media-path", str(Path(local_files).resolve())]
    command += extra or []
    reach = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return Plan(
        command=command,
        env=env,
        # Bytecode off would compile vLLM anew on every start: two minutes instead of one.
        unset=["PYTHONDONTWRITEBYTECODE"],
        url=f"http://{f'[{reach}]' if ':' in reach else reach}:{port}",
        log=Path(log or state / f"server-{port}.log"),
        deploy=deploy,
        api_key=key,
        model=export.name,
    )


def start(plan: Plan, extra_env: dict[str, str] | None = None) -> Server:
    """Start the server as a child in a session of its own, output into the log."""
    env = {k: v for k, v in os.environ.items() if k not in plan.unset}
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    with plan.log.open("wb") as log:
        process = subprocess.Popen(
            plan.command,
            env=env | plan.env | (extra_env or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(plan, process)


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gpu_memory_gb() -> list[float]:
    """Memory of each visible NVIDIA GPU; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    run = subprocess.run(query, capture_output=True, text=True)
    found = [float(line) / 1024 for line in run.stdout.split() if line.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len(visible.split(","))]


def pick_profile(gpus_gb: list[float]) -> str:
    """Name of the profile for the GPUs found."""
    if not gpus_gb:
        return "cpu_smoke"
    if gpus_gb[0] < 30:
        return "small_gpu"
    return "two_gpu" if len(gpus_gb) > 1 else "throughput"


def _profile_file(export: Path, profile: str) -> Path:
    places = [export / "deploy" / f"{profile}.yaml", PROFILES / f"{profile}.yaml", Path(profile)]
    for place in places:
        if place.is_file():
            return place.resolve()
    known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
    raise FileNotFoundError(f"no profile {profile!r}; there are {known}, or name a YAML file")


def _vllm(given: str | None, cpu: bool) -> str:
    """The vllm program: given, the CPU environment's, this environment's, or on the PATH."""
    root = Path(__file__).resolve().parents[1]
    places = (
        [given]
        if given
        else [
            str(root / ".venv-serve" / "bin" / "vllm") if cpu else None,
            str(Path(sys.executable).with_name("vllm")),
            shutil.which("vllm"),
        ]
    )
    for place in places:
        if place and Path(place).is_file():
            return place
    fix = "`make serve-env` installs it" if cpu else "`pip install 'higgs_lab[serve]'`"
    raise FileNotFoundError(f"vllm is not installed ({fix}); or give its path with --vllm")


def run(plan: Plan, timeout_sec: float) -> int:
    """Start, wait, announce, and stay until the server ends; returns its exit code."""
    server = start(plan)
    asked = []  # signals that we passed on: it ends because of them

    def forward(number, frame):
        asked.append(number)
        if server.process.poll() is None:
            server.process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    try:
        seconds = server.wait_ready(timeout_sec)
        print(f"ready after {seconds:.0f} s; log in {plan.log}. Try:")
        print(f'  python -m serve.client "Hello there." --out hello.wav --url {plan.url}')
        if plan.api_key:
            print(f"API key (VLLM_API_KEY for the client): {plan.api_key}")
        sys.stdout.flush()
        code = server.process.wait()
        if not asked and (why := epitaph(code, server.log_text())):
            print(f"serve.launch: {why}\nThe whole log: {plan.log}", file=sys.stderr)
        return code if code >= 0 else 128 - code  # as a shell would say it
    except (RuntimeError, TimeoutError) as error:
        if asked:
            return 0  # stopped while it was starting
        print(f"serve.launch: {error}", file=sys.stderr)
        return server.process.poll() or 1
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export")
    parser.add_argument("--profile", help="name of a profile, or a deploy YAML")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", help="default: VLLM_API_KEY; made up on another --host")
    parser.add_argument("--local-files", metavar="FOLDER", help="file:// references from here only")
    parser.add_argument("--media-domains", nargs="+", metavar="HOST", help="http(s):// references")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FOLDER",
                        help="an adapter beside the export, spoken with by model=NAME")  # fmt: skip
    parser.add_argument("--max-loras", type=int, help="adapters that a batch may mix; default 8")
    parser.add_argument("--vllm", help="path of the vllm program")
    parser.add_argument("--state", help=f"folder for voices, caches and log; default {STATE}")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server")
    parser.add_argument("--no-check", action="store_true", help="skip the check of the export")
    parser.add_argument("--print", action="store_true", help="say what would be run, and stop")
    args, extra = parser.parse_known_args()  # the rest is passed on to vllm
    try:
        plan = make_plan(
            args.export, args.profile, args.device, args.host, args.port, args.api_key, args.vllm,
            state=args.state, extra=[word for word in extra if word != "--"],
            local_files=args.local_files, media_domains=args.media_domains,
        )  # fmt: skip
        if args.lora:
            from serve.adapters import parse_lora, with_adapters

            plan = with_adapters(plan, args.export, parse_lora(args.lora), args.max_loras)
    except (OSError, ValueError) as error:
        sys.exit(f"serve.launch: {error}")
    print(plan.show(), flush=True)
    if args.print:
        return
    if not args.no_check:
        from serve.check import check_export, failures, table

        if bad := failures(check_export(args.export), "vllm"):
            sys.exit(f"serve.launch: the server would not serve this export:\n{table(bad)}")
    sys.exit(run(plan, args.timeout))


if __name__ == "__main__":
    main()
