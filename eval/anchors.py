"""What the figures of a run stand between: the human recordings and the codec round trip.

The human row (`--floor`) is what the recogniser gets wrong on real speech; nothing below it means
anything. The codec row (`--ceiling`) is the same recordings through the codec, the best that any
talker on top of it can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.paired import METRICS, paired_differences, pairs_of
from eval.runs import differences, read_scores, read_summary

FLOOR_LIMIT = 0.15  # a recogniser that errs more on human speech says little about ours
KINDS = {"floor": "human", "ceiling": "codec"}  # option -> the kind of system it must be
_MEASURED = ("set", "asr", "normalizer", "metrics")


@dataclass(frozen=True)
class Anchor:
    option: str  # "floor" or "ceiling"
    run: str
    summary: dict

    def beside(self, scores: list[dict], config: dict, seed: int = 0) -> dict:
        """{code or "overall": {"error": estimate, ..., "excess": difference}} for a run's scores.

        excess: the run's error minus this one's on the same texts, paired. Similarities are left
        out if another encoder measured them.
        """
        names = ["error", "cer"]
        before, now = (c["encoder"] or {} for c in (self.summary["config"], config))
        if before.get("revision") == now.get("revision"):
            names += [name for name in METRICS if name.startswith("sim_")]
        blocks = self.summary["languages"] | {"overall": self.summary["overall"]}
        found = {code: {name: block[name] for name in names} for code, block in blocks.items()}
        pairs = pairs_of(read_scores(self.run), scores)
        excess = paired_differences(pairs, "error", seed) or {"languages": {}, "overall": None}
        for code, block in found.items():
            block["excess"] = (excess["languages"] | {"overall": excess["overall"]}).get(code)
        return found


def read_anchor(option: str, run: str | Path | None, config: dict) -> Anchor | None:
    """A finished run of human recordings or of the codec, if it was measured as `config` says.

    Raises ValueError naming the setting that differs.
    """
    if run is None:
        return None
    summary = read_summary(run)
    before = summary["config"]
    kind = KINDS[option]
    if before["system"].get("kind") != kind:
        raise ValueError(
            f"--{option} {run}: that run is of {before['system']['name']}, not of {kind}"
        )
    apart = differences(
        {key: before[key] for key in _MEASURED}, {key: config[key] for key in _MEASURED}
    )
    apart = [entry for entry in apart if entry[0] != "set.references"]
    if apart:
        name, old, new = apart[0]
        raise ValueError(
            f"--{option} {run}: {name} is {old!r} there and {new!r} here; run it again with the "
            "same set, --limit, --seed, --asr and --normalizer"
        )
    return Anchor(option, str(run), summary)
