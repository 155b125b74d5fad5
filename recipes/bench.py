"""What the benches share: rows that are printed as they come, a clock, random models in any size.

They need torch, transformers, peft, accelerate, numpy and safetensors, no sound or data library, so
that they run on a bare GPU machine.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from higgs_lab.checkpoint import load_talker
from higgs_lab.cost import GIB, matrix_tflops
from higgs_lab.nano import nano_checkpoint
from higgs_lab.nano.random_4b import TEXT_CONFIG_4B
from higgs_lab.runlog import provenance, write_json_atomic
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import Vocab

PEAK_SHARE = "share of peak"  # the column for which a peak is measured


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("nano", "4b"), help="default: 4b on a GPU, else nano")
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="after so many no row is begun any more (default: %(default)s)",
    )
    parser.add_argument(
        "--row-sec",
        type=float,
        default=6,
        help="measure each row at least so long (default: %(default)s)",
    )
    parser.add_argument("--only", default="", help="rows whose name holds one of these, by commas")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each row")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, rewritten after each")
    return parser


class Bench:
    """A table that grows: each row is measured, printed and saved before the next begins."""

    def __init__(self, args: argparse.Namespace, columns: list[str]):
        self.args, self.columns = args, columns
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = args.size or ("4b" if self.device.type == "cuda" else "nano")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.began, self.rows, self.row_sec = time.monotonic(), [], args.row_sec
        self.peak = None
        self.vocab = Vocab.from_pretrained(nano_checkpoint())
        print(f"{self.machine()}, torch {torch.__version__}, {self.size} shape")
        if PEAK_SHARE in columns:
            self.peak = matrix_tflops(self.device, self.dtype)
            print(
                f"matrix products: {self.peak:,.3g} TFLOP/s measured, the peak of the shares below"
            )
        print("| method | " + " | ".join(columns) + " |")
        print("|---|" + "---|" * len(columns), flush=True)

    def machine(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"

    def wanted(self, name: str) -> bool:
        """Whether --only asks for this row."""
        parts = [part for part in self.args.only.split(",") if part]
        return not parts or any(part in name for part in parts)

    def share(self, rows: list[tuple[str, Callable[[], dict]]]) -> None:
        """These rows in turn, each measured for its share of the time left, --row-sec at most.

        None is begun for which there is too little time, going by the last row whose name begins
        with the same word: what it took but for its `spare_sec`. At the end such rows are named.
        """
        rows, least, late = [row for row in rows if self.wanted(row[0])], {}, []
        for place, (name, measure) in enumerate(rows):
            kind, left = name.split()[0], self.args.seconds - (time.monotonic() - self.began)
            if left <= least.get(kind, 0.0):
                late.append(name)
                self._add(name, {}, f"left out: {max(0.0, left):.0f} s left")
                continue
            self.row_sec = min(self.args.row_sec, left / (len(rows) - place))
            begun = time.monotonic()
            found = self.row(name, measure) or {}
            if "spare_sec" in found:
                least[kind] = time.monotonic() - begun - found["spare_sec"]
        if late:
            print(
                f"{len(late)} of {len(rows)} rows left out, --seconds {self.args.seconds:g} are "
                f"too few for them: {'; '.join(late)}",
                flush=True,
            )

    def row(self, name: str, measure: Callable[[], dict]) -> dict | None:
        """One row; measure gives cells by column. Whatever goes wrong, the next row is tried."""
        if not self.wanted(name):
            return None
        spent = time.monotonic() - self.began
        if spent > self.args.seconds:
            return self._add(name, {}, f"left out: {spent:.0f} s of {self.args.seconds:.0f} spent")
        self.clean()
        begun = time.monotonic()
        try:
            return self._add(name, measure() | {"row_sec": time.monotonic() - begun})
        except torch.OutOfMemoryError:
            return self._add(name, {}, "out of memory")
        except ImportError as error:
            return self._add(name, {}, f"left out: {error}")
        except Exception as error:  # a bench that stops at its third row wastes a rented card
            return self._add(name, {}, f"failed: {type(error).__name__}: {error}")
        finally:
            self.clean()

    def _add(self, name: str, cells: dict, note: str = "") -> dict:
        row = {"method": name} | cells | ({"note": note} if note else {})
        self.rows.append(row)
        shown = [_cell(row.get(column)) for column in self.columns]
        if note:
            shown = [note.splitlines()[0][:160]] + [""] * (len(self.columns) - 1)
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)
        self.save()
        return row

    def save(self) -> None:
        if self.args.out:
            about = {"machine": self.machine(), "size": self.size}
            about |= {"peak_tflops": self.peak} if self.peak else {}
            write_json_atomic(self.args.out, about | {"rows": self.rows} | provenance())

    def profile(self, run: Callable[[], object]) -> None:
        """With --profile: where the time of `run` goes, by kernel."""
        if not self.args.profile:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        column = "self_cpu_time_total"
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            column = "self_cuda_time_total"
        with torch.profiler.profile(activities=kinds) as profiler:
            run()
            synchronize()
        table = profiler.key_averages().table(
            sort_by=column, row_limit=30, max_name_column_width=70
        )
        print(table, flush=True)

    def multiples(self, column: str, pairs: list[tuple[str, str]]) -> None:
        """Lines that say how much faster one row is than another."""
        found = {row["method"]: row.get(column) for row in self.rows}
        for ours, plain in pairs:
            if found.get(ours) and found.get(plain):
                times = found[ours] / found[plain]
                print(f"{ours}: {times:.2f} times {plain} ({column})", flush=True)
                self.rows.append({"method": f"{ours} / {plain}", "times": times})
        self.save()

    def clean(self) -> None:
        gc.collect()
        torch._dynamo.reset()  # rows differ in shapes, and a function compiles eight times at most
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory_gib(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / GIB

    def talker(self, dtype: torch.dtype | None = None) -> Talker:
        """nano as it is, or random weights in the 4B shape, made on the device."""
        dtype = dtype or self.dtype
        if self.size == "nano":
            return load_talker(nano_checkpoint(), self.device, dtype)
        with torch.device("meta"):
            talker = Talker(talker_config(TEXT_CONFIG_4B), 8, self.vocab.codebook_size)
        talker = talker.to(dtype).to_empty(device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for parameter in talker.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1)
                else:
                    parameter.normal_(0, 0.02, generator=generator)
        talker.materialize_rope(self.device)
        return talker.requires_grad_(False).eval()


def timed(step: Callable[[int], float], row_sec: float, warm: int = 5, least: int = 3) -> dict:
    """Call step(i), which returns how much it did, for at least row_sec and `least` times.

    Gives per_sec; per_cpu_sec, of all threads, which says more where others use the machine; steps;
    spare_sec, of the steps beyond `least`; and first_sec: the first call, with all compiling.
    """
    begun = time.monotonic()
    step(0)
    synchronize()
    first = time.monotonic() - begun
    for i in range(1, warm):
        step(i)
    synchronize()
    begun, worked, done, i = time.monotonic(), time.process_time(), 0.0, warm
    while i < warm + least or time.monotonic() - begun < row_sec:
        done += step(i)
        i += 1
        if i % 4 == 0:
            synchronize()  # or the host runs far ahead of the clock
    synchronize()
    seconds = time.monotonic() - begun
    worked = time.process_time() - worked
    rates = {"per_sec": done / seconds, "per_cpu_sec": done / worked}
    spare = seconds * (1 - least / (i - warm))
    return rates | {"steps": i - warm, "spare_sec": spare, "first_sec": first}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
