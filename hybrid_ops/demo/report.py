"""The demo's picture: one HTML file that needs nothing else, drawn by the script in page.html from the data in it."""

import base64
import importlib.resources
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..selfcheck import Row
from .prove import Drafting, Memory, Proof, Speed
from .text import Compressed, Corpus
from .train import Recipe, bits


@dataclass
class Results:
    """What a run of the demo found, filled step by step."""

    machine: str
    recipe: Recipe
    corpus: Corpus
    prompt: bytes
    pattern: str
    parameters: int
    losses: list[float] = field(default_factory=list)  # nats
    training_seconds: float = 0.0
    samples: list[tuple[int, bytes]] = field(default_factory=list)  # (step, continuation of the prompt)
    surprise: np.ndarray = field(default_factory=lambda: np.empty(0))  # bits of every held-out byte
    compressors: dict[str, Compressed] = field(default_factory=dict)
    ngram: tuple[int, float] = (0, math.nan)  # (n, bits)
    written: bytes = b""
    loads: list[np.ndarray] = field(default_factory=list)  # of each mixture of experts, by expert
    speeds: list[Speed] = field(default_factory=list)
    drafting: Drafting | None = None
    proofs: list[Proof] = field(default_factory=list)
    memory: Memory | None = None
    ops: list[Row] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bits(self) -> float:
        """Bits per byte of the held-out text."""
        return float(self.surprise.mean())

    @property
    def rivals(self) -> dict[str, float]:
        """Bits per byte of the others, who have all read the training text, the best first."""
        rivals = {name: size.primed for name, size in self.compressors.items()}
        rivals[f"{self.ngram[0]}-gram"] = self.ngram[1]
        return dict(sorted(rivals.items(), key=lambda item: item[1]))


def printable(text: bytes) -> str:
    """As it is, with a middle dot for each byte that is neither printable ASCII nor a line feed."""
    return "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "·" for byte in text)


def page(results: Results) -> str:
    """The HTML document."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(_data(results), separators=(",", ":"), allow_nan=False)
    return template.replace("@@DATA@@", data.replace("<", "\\u003c"))


def _data(results: Results) -> dict[str, Any]:
    recipe, corpus = results.recipe, results.corpus
    return {
        "machine": results.machine,
        "pattern": results.pattern,
        "parameters": results.parameters,
        "seconds": round(results.seconds),
        "trainingSeconds": round(results.training_seconds),
        "trainBytes": len(corpus.train),
        "heldOutBytes": len(corpus.held_out),
        "topics": list(corpus.held_out_topics),
        "bytesPerStep": recipe.bytes_per_step,
        "losses": [round(bits(loss), 3) for loss in results.losses],
        "prompt": printable(results.prompt),
        "samples": [[step, printable(text)] for step, text in results.samples],
        "bits": round(results.bits, 4),
        "rivals": {name: round(value, 4) for name, value in results.rivals.items()},
        "alone": {name: round(size.alone, 4) for name, size in results.compressors.items()},
        "heldOut": printable(corpus.held_out),
        "surprise": [round(10 * float(value)) for value in results.surprise],  # tenths of a bit
        "written": printable(results.written),
        "loads": [[round(float(share), 4) for share in layer] for layer in results.loads],
        "speeds": [speed._asdict() for speed in results.speeds],
        "acceptance": [] if results.drafting is None else [round(a, 4) for a in results.drafting.acceptance],
        "perPass": 0 if results.drafting is None else round(results.drafting.per_pass, 2),
        "proofs": [proof._asdict() for proof in results.proofs],
        "memory": None if results.memory is None else _memory(results.memory),
        "ops": [
            {
                "op": r.op,
                "impl": r.impl,
                "where": r.where,
                "ratio": _finite(r.ratio),
                "passed": r.passed,
                "skipped": r.skipped,
            }
            for r in results.ops
        ],
        "bench": [
            {"op": row["op"], "case": row["case"], "impl": row["impl"], "us": row["gpu_us"], "floor": row["floor_us"]}
            | {"peers": row["peers"]}
            for row in results.bench
            if row["gpu_us"] is not None
        ],
    }


def _finite(ratio: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: an error without bound is None."""
    return {dtype: round(value, 3) if math.isfinite(value) else None for dtype, value in ratio.items()}


def _memory(memory: Memory) -> dict[str, Any]:
    """States as bytes, 128 for 0, and over time along the direction of head_dim in which they vary most."""
    states = memory.states
    channels = states.transpose(1, 0, 2).reshape(states.shape[1], -1)
    direction = np.linalg.svd(channels @ channels.T)[0][:, 0]
    return {
        "text": printable(memory.text),
        "layer": memory.layer,
        "head": memory.head,
        "shape": list(states.shape),
        "states": _as_bytes(states),
        "strip": _as_bytes(np.einsum("p,tpn->tn", direction, states)),
    }


def _as_bytes(values: np.ndarray) -> str:
    """base64 of uint8: square roots, so that small values can be told from zero, scaled to -127 .. 127, plus 128."""
    scale = max(float(np.quantile(np.abs(values), 0.995)), 1e-12)
    unit = np.clip(values / scale, -1, 1)
    code = np.round(127 * np.sign(unit) * np.sqrt(np.abs(unit))) + 128
    return base64.b64encode(code.astype(np.uint8).tobytes()).decode("ascii")
