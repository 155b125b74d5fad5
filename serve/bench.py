"""`python -m serve.bench`: how much a server speaks, how soon, and whether a listener would notice.

    python -m serve.bench --url http://127.0.0.1:8000 --out bench/x       # 1, 4 and 16 at a time
    python -m serve.bench --url http://127.0.0.1:8000 --out bench/x --rate 0.5 1 2
    python -m serve.bench --url http://a:8000 --url http://b:8000 --out bench/ab   # side by side
    python -m serve.bench --export exports/x --profile throughput --profile two_gpu --out bench/p
    python -m serve.bench --url http://127.0.0.1:8000 --out bench/x --consistency --asr large-v3

Closed loops (--concurrency): N callers, each asks again when it has its answer. Open loops
(--rate): requests arrive at random whether or not the server keeps up, and latency counts from the
arrival. All requests stream; request n has text n and seed n everywhere, so two servers do the same
work, and running ones take turns at each load. The requests before a load do not count (warm-up).

Reported for each load, with 95 % intervals: time to the first audio, real-time factor (seconds of
waiting per second of sound), seconds of sound per second; p50, p95 and p99; the share of requests
in which a player that starts --player-delay after the first piece runs dry, and the delay that
would have been enough; failures. In the output folder: bench.json (with every request), table.txt,
bench.png.

--consistency: the same greedy requests one at a time and 16 at a time must give the same codes (the
same sound where the server does not write its codes down); with --asr, the word errors of eval.run
in stock sampling must agree within their intervals, one at a time and 16 at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from higgs_lab.runlog import atomic_path, provenance, write_json_atomic
from serve import bench_report
from serve.client import DIALECTS, SAMPLING, ServerError, is_healthy
from serve.consistency import Consistency
from serve.launch import Plan, free_port, make_plan, start
from serve.load import Level, Load, Target, closed_loop, prepare

TEXTS = Path(__file__).with_name("validate_texts.txt")
WARM_UP_SEED = 1_000_000  # seeds that the loads do not use: nothing of them may be remembered


@dataclass
class Bench:
    """Loads measured so far; out/bench.json holds them after each."""

    texts: Sequence[str]
    out: Path
    seed: int = 0
    delay_sec: float = 0.1  # between the first piece and the player's start
    about: dict = field(default_factory=dict)
    levels: list[dict] = field(default_factory=list)
    loads: dict[str, dict[str, Load]] = field(default_factory=dict)  # level -> server -> load
    consistency: list[dict] = field(default_factory=list)

    def measure(self, target: Target, level: Level) -> dict:
        """One server at one level, after a warm-up that is kept apart."""
        print(f"{target.name}: {level}, {level.count} requests", file=sys.stderr)
        target = prepare(target)
        seed = self.seed + WARM_UP_SEED
        warm = closed_loop(target, self.texts, level.warm_up, level.warm_up, seed)
        load = level.measure(target, self.texts, self.seed)
        self.loads.setdefault(str(level), {})[target.name] = load
        self.levels.append(
            {
                "server": target.name,
                "load": str(level),
                "kind": level.kind,
                "value": level.value,
                "summary": bench_report.summarise(load, self.delay_sec),
                "warm_up": [asdict(take) for take in warm.takes],
                "takes": [asdict(take) for take in load.takes],
                "end_sec": load.end_sec,
            }
        )
        self.save()
        return self.levels[-1]["summary"]

    def comparisons(self) -> list[dict]:
        """Second server over first, at each load that both have seen."""
        found = []
        for level, loads in self.loads.items():
            if len(loads) == 2:
                (first, one), (second, two) = loads.items()
                figures = bench_report.compare(one, two)
                found.append({"load": level, "first": first, "second": second, "figures": figures})
        return found

    def save(self) -> None:
        kept = {"about": self.about, "levels": self.levels, "comparisons": self.comparisons()}
        write_json_atomic(self.out / "bench.json", kept | {"consistency": self.consistency})

    def report(self) -> str:
        """Write table and plot; returns the table."""
        self.save()
        parts = []
        if self.levels:
            parts.append(bench_report.table(self.levels))
            bench_report.plot(self.levels, self.out / "bench.png")
        if comparisons := self.comparisons():
            parts.append(bench_report.comparison_table(comparisons))
        parts += [line for one in self.consistency for line in one["lines"]]
        text = "\n\n".join(parts)
        with atomic_path(self.out / "table.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return text


def _levels(args: argparse.Namespace) -> list[Level]:
    """The closed loops, then the open ones."""
    concurrency, rates = args.concurrency or [], args.rate or []
    if not concurrency and not rates and not args.consistency:
        concurrency = [1, 4, 16]
    if any(n < 1 for n in concurrency) or any(rate <= 0 for rate in rates):
        raise ValueError("--concurrency and --rate must be positive")
    if args.requests is not None and args.requests < max(concurrency, default=1):
        raise ValueError("--requests is less than --concurrency: callers would have nothing to do")
    closed = [Level("closed", n, args.requests or max(32, 4 * n)) for n in concurrency]
    return closed + [Level("open", r, args.requests or max(32, round(60 * r))) for r in rates]


def _texts(path: str | None) -> list[str]:
    lines = Path(path or TEXTS).read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no texts: one a line")
    return texts


def _options(args: argparse.Namespace) -> dict:
    names = (*SAMPLING, "max_new_tokens", "model", "voice", "ref_audio", "ref_text")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _running(args: argparse.Namespace) -> list[Target]:
    """Servers that somebody started."""
    names = args.name or (args.url if len(args.url) > 1 else ["server"])
    if len(names) != len(args.url) or len(set(names)) != len(names):
        raise ValueError("give each --url a --name of its own")
    dialects = args.dialect * len(args.url) if len(args.dialect) == 1 else args.dialect
    if len(dialects) != len(args.url):
        raise ValueError("give one --dialect for all --urls, or one for each")
    for url in args.url:
        if not is_healthy(url):
            raise ServerError(f"nobody answers {url}/health")
    return [
        Target(name, url, dialect, args.api_key, _options(args))
        for name, url, dialect in zip(names, args.url, dialects, strict=True)
    ]


@contextlib.contextmanager
def _started(args: argparse.Namespace, profile: str | None) -> Iterator[tuple[Target, Plan]]:
    """A server of our own for --export."""
    name = Path(profile).stem if profile else Path(args.export).name
    plan = make_plan(
        args.export, profile, args.device, port=free_port(), vllm=args.vllm, state=args.state
    )
    dumps = args.out / "rows" / name
    with start(plan, {"HIGGS_LAB_DUMP_DIR": str(dumps)} if args.consistency else None) as server:
        server.wait_ready()
        yield Target(name, plan.url, "vllm", plan.api_key, _options(args)), plan


def run(args: argparse.Namespace) -> bool:
    """Measure what the command line asks for; whether the consistency checks hold."""
    if (args.export is None) == (not args.url):
        raise ValueError("give --url of running servers, or --export to start one")
    if args.export is None and args.profile:
        raise ValueError("--profile goes with --export")
    levels, texts = _levels(args), _texts(args.texts)
    about = provenance(seed=args.seed, player_delay_sec=args.player_delay, options=_options(args))
    about["command"] = ["***" if word == args.api_key else word for word in about["command"]]
    bench = Bench(texts, args.out, args.seed, args.player_delay, about)
    check = Consistency(texts, args.out, args.consistency, args.asr, args.language)

    def examine(target: Target, **known) -> None:
        if args.consistency:
            bench.consistency.append(check.run(prepare(target), **known))
            bench.save()

    if args.export is None:
        targets = _running(args)
        for level in levels:
            for target in targets:
                bench.measure(target, level)
        for target in targets:
            examine(target, dumps=args.dumps, float32=args.float32)
    else:
        for profile in args.profile or [None]:
            with _started(args, profile) as (target, plan):
                for level in levels:
                    bench.measure(target, level)
                dumps = args.out / "rows" / target.name
                examine(target, dumps=dumps, float32=args.float32 or _is_float32(plan))
    print(bench.report())
    print(f"\nAll figures: {args.out / 'bench.json'}", file=sys.stderr)
    return all(one["ok"] for one in bench.consistency)


def _is_float32(plan: Plan) -> bool:
    import torch

    from serve.live import deploy_dtype

    return deploy_dtype(plan.deploy) == torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.bench",
        description=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", action="append", default=[], help="a running server; may repeat")
    parser.add_argument("--name", action="append", default=[], help="what to call it")
    parser.add_argument(
        "--dialect", action="append", choices=DIALECTS, help="one, or one per --url"
    )
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    parser.add_argument("--export", help="start a server on this export, as serve.launch would")
    parser.add_argument("--profile", action="append", help="deploy profile of --export; may repeat")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--vllm", help="path of the vllm program")
    parser.add_argument("--state", help="folder for the server's caches and log")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="closed loops")
    parser.add_argument("--rate", type=float, nargs="+", metavar="R", help="open loops, requests/s")
    parser.add_argument("--requests", type=int, help="per load; default 32, 4 per caller, or 60 s")
    parser.add_argument("--texts", help="file of texts, one a line; default 50 sentences")
    parser.add_argument("--player-delay", type=float, default=0.1, help="seconds; default 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and their arrival")
    parser.add_argument("--ref-audio", help="voice to clone in every request")
    parser.add_argument("--ref-text", help="what it says")
    parser.add_argument("--voice", help="an uploaded voice")
    parser.add_argument("--model", help="model name, if the server has several")
    parser.add_argument("--max-new-tokens", type=int, help="rows, 25 a second")
    for name, kind in zip(SAMPLING, (float, float, int), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--consistency", type=int, nargs="?", const=16, metavar="N",
                        help="compare one at a time with N at a time; default 16")  # fmt: skip
    parser.add_argument("--float32", action="store_true",
                        help="the server computes in float32: differences fail")  # fmt: skip
    parser.add_argument("--dumps", help="where the server writes its rows (HIGGS_LAB_DUMP_DIR)")
    parser.add_argument("--asr", help="recogniser of eval.run, for word errors in --consistency")
    parser.add_argument("--language", default="en", help="of --texts, for --asr")
    args = parser.parse_args()
    args.dialect = args.dialect or ["vllm"]
    try:
        consistent = run(args)
    except (ServerError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"serve.bench: {error}")
    sys.exit(0 if consistent else 1)


if __name__ == "__main__":
    main()
