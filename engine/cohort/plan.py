"""What a cohort will cost, before a weight is read: rows, px, FLOP, disk, time, and the rows that cannot be made."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.cohort.config import CohortConfig
from engine.cohort.table import Asked, BadRow, Row
from engine.core.errors import EngineError
from engine.generation.cost import (
    Calls,
    NetworkCost,
    assumed_speed,
    duration,
    evaluated,
    export_nbytes,
    network_cost,
    pass_calls,
)
from engine.model.config import ModelConfig
from engine.sampling.plan import make_plan

_SHOWN = 20


@dataclass(frozen=True)
class _Size:
    """The pictures of one size."""

    height: int
    width: int
    count: int
    flop: float
    """Of all of them."""
    nbytes: int


def plan_text(config: CohortConfig, asked: Sequence[Asked], model: ModelConfig, device: str) -> str:
    """Return what --plan prints. `device` is "cpu" or "cuda". Raises: EngineError for what the model cannot draw."""
    rows = [row for row in asked if isinstance(row, Row)]
    bad = [row for row in asked if isinstance(row, BadRow)]
    lines = [f"rows            {len(asked)}: {len(rows)} to make, {len(bad)} that cannot be made"]
    sources = Counter("reference" if r.reference else "embeddings" if r.embeddings else "text" if r.text else "cdm"
                      for r in rows)  # fmt: skip
    lines.append(f"drawn after     {', '.join(f'{n} {name}' for name, n in sources.items()) or 'nothing'}")
    labelled, people = sum(bool(r.label) for r in rows), len({r.owner for r in rows if r.owner})
    lines.append(f"labels          {labelled} rows with a label, {people} patients")
    cost = network_cost(model, config.model.dtype, config.sampling.batch_size, config.sampling.weight > 0)
    speed, source = assumed_speed(config, model, config.ray.replicas or 1, device)
    total = (
        _bag_lines(config, rows, cost, lines) if config.bags_only else _picture_lines(config, rows, model, cost, lines)
    )
    lines.append(f"time            about {duration(total / speed / 1e12)}, {source}; without encoders and exports")
    lines += [f"  {row.code}: {row.message}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(lines)


def _picture_lines(
    config: CohortConfig, rows: Sequence[Row], model: ModelConfig, cost: NetworkCost, lines: list[str]
) -> float:
    """Add what pictures cost; return their FLOP."""
    counts = Counter((row.height or 0, row.width or 0) for row in rows)
    sizes = [_size(config, model, cost, size, count) for size, count in sorted(counts.items())]
    lines.append("pictures        px (h x w)     count        FLOP of all")
    lines += [f"{'':15} {f'{s.height} x {s.width}':>11} {s.count:9} {s.flop / 1e12:14,.2f} TFLOP" for s in sizes]
    nbytes = sum(s.nbytes for s in sizes)
    px = sum(s.height * s.width * s.count for s in sizes)
    lines.append(f"px              {px / 1e6:,.1f} million")
    lines.append(f"disk            at most {nbytes / 2**30:,.2f} GiB (keep={config.keep})")
    return sum(s.flop for s in sizes)


def _size(config: CohortConfig, model: ModelConfig, cost: NetworkCost, size: tuple[int, int], count: int) -> _Size:
    height, width = size
    try:
        plan = make_plan(replace(config, canvas=replace(config.canvas, height=height, width=width)), model.scale)
    except ValueError as error:
        raise EngineError(str(error)) from error
    calls = sum((pass_calls(plan, p, config) for p in plan.passes), Calls(decode=evaluated(plan.decode)))
    file = height * width * 3 * 4 // 3
    latents = sum(3 * 4 * 2 * level.height * level.width for level in plan.levels)
    each = file + (export_nbytes(plan, config) + latents if config.keep == "runs" else 0)
    return _Size(height, width, count, calls.flop(cost) * count, each * count)


def _bag_lines(config: CohortConfig, rows: Sequence[Row], cost: NetworkCost, lines: list[str]) -> float:
    """Add what bags cost; return their FLOP. How many coarse tiles there are depends on the slides: a tenth is said."""
    tiles, bags = config.bags.tiles, config.bags
    steps = bags.sampler(seed=0).taken
    encodings = 2 if bags.strength < 1 else 1
    each = cost.unet * steps * (2 if bags.scale > 1 else 1) + cost.decode + encodings * cost.encode + cost.unet
    lines.append(
        f"bags            {len(rows)} of at most {tiles} fine tiles, each one patch; about a tenth more coarse ones"
    )
    return 1.1 * tiles * len(rows) * each
