"""Replay the reference activations lying beside a checkpoint: is this machine, dtype and version right?

    python -m engine.parity FOLDER [--dtype float32|float64|bfloat16] [--device cpu|cuda] [--json]

Prints one line per reference; exit code 1 if any is over its tolerance. The joint step is replayed in float64 whatever
--dtype says, except in half precision, where it is left out: in float32 its finite differences amplify rounding.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.core.errors import CheckpointError
from engine.core.exits import DONE, FAILED, exit_code, print_anywhere
from engine.model.zoomldm import ZoomLDM
from engine.parity_checks.activations import (
    Check,
    Expected,
    loosened,
    replay_decode_large,
    replay_inversion,
    replay_panorama,
    replay_parts,
    replay_refine,
)
from engine.parity_checks.joint import replay_joint
from engine.parity_checks.networks import replay_cdm, replay_encoder

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HALF_FACTOR = {"bfloat16": 2e3, "float16": 400}
"""Tolerances of half precision, in units of float32's: 8 and 11 bits of mantissa against 24, measured, not derived."""
_INPUT = ("summarizer.in.", "unet.x", "unet.t", "unet.context", "vae.image", "refine.noise.", "refine.x0_in",
          "refine.ssl_grid", "decode_large.latent", "panorama.noise.", "panorama.init.", "panorama.embeddings",
          "x_T", "guide_x_T", "ssl_grid", "encoder.image", "inversion.feat", "inversion.latent",
          "inversion.eps", "cdm.x", "cdm.t", "cdm.y")  # fmt: skip
_BESIDE = {"encoder.image": replay_encoder, "cdm.x": replay_cdm}
"""Networks that are no ZoomLDM, by the input that their references have."""


def is_input(name: str) -> bool:
    """Say whether a reference is given to the replay rather than compared with it."""
    return name.startswith(_INPUT) or name.endswith((".noise", ".guide_noise", ".z"))


def read_expected(folder: Path) -> Expected:
    """Read every expected*.safetensors of a folder. Raises CheckpointError when there is none or one is damaged."""
    files = sorted(folder.glob("expected*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} must hold reference activations (expected*.safetensors); it holds none. "
            "Give the folder of a checkpoint that comes with them."
        )
    found: Expected = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} must be a whole safetensors file; got: {error}. Fetch it again.") from error
    return found


def replay(folder: Path, dtype: str, device: str, expected: Expected) -> Iterator[Check]:
    """Yield a Check per reference that this version covers."""
    half = _HALF_FACTOR.get(dtype)
    for given, replay_network in _BESIDE.items():
        if given in expected:
            with torch.inference_mode():
                checks = replay_network(folder, expected, device, _DTYPES[dtype])
                yield from checks if half is None else loosened(checks, half)
            return
    if not (folder / "weights.ckpt").exists() and not (folder / "config.json").exists():
        return
    model, raw = ZoomLDM.from_pretrained(str(folder), device=device, dtype=_DTYPES[dtype]), None
    if "unet.eps_raw" in expected:
        raw = ZoomLDM.from_pretrained(str(folder), device=device, dtype=_DTYPES[dtype], weights="raw")
        gradients = replay_inversion(raw, expected)
        yield from gradients if half is None else loosened(gradients, half)
    with torch.inference_mode():
        parts = replay_parts(model, raw, expected)
        yield from parts if half is None else loosened(parts, half)
        if half is None:
            yield from replay_decode_large(model, expected)
            yield from replay_refine(model, expected)
            yield from replay_panorama(model, expected)
            yield from replay_joint(model.to(torch.float64), expected)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    print_anywhere()
    parser = argparse.ArgumentParser(prog="python -m engine.parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder with expected*.safetensors beside the weights")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="arithmetic of the networks")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args(argv)
    return exit_code("engine.parity", partial(_compare, arguments), lambda: "Nothing is kept; run the command again.")


def _compare(arguments: argparse.Namespace) -> int:
    expected = read_expected(arguments.folder)
    checks = list(replay(arguments.folder, arguments.dtype, arguments.device, expected))
    covered = {check.name for check in checks}
    missing = sorted(name for name in expected if name not in covered and not is_input(name))
    if arguments.json:
        shown = ("error", "tolerance", "ok", "ties", "otherwise")
        report = {c.name: {key: getattr(c, key) for key in shown} for c in checks}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        sys.stdout.write(table(checks, missing))
    return DONE if all(check.ok for check in checks) and checks else FAILED


def table(checks: list[Check], missing: list[str]) -> str:
    """Return the report for a terminal."""
    width = max((len(name) for name in [*(c.name for c in checks), *missing]), default=10)
    lines = [f"{'reference':<{width}}  {'error':>9}  {'tolerance':>9}"]
    lines += [f"{c.name:<{width}}  {c.error:9.2e}  {c.tolerance:9.0e}  {verdict(c)}" for c in checks]
    lines += [f"{name:<{width}}  {'-':>9}  {'-':>9}  not covered" for name in missing]
    over = sum(not c.ok for c in checks)
    lines.append(f"{len(checks)} compared, {over} over tolerance, {len(missing)} not covered")
    return "\n".join(lines) + "\n"


def verdict(check: Check) -> str:
    """Say whether a check holds, and what was put down to ties."""
    said = "ok" if check.ok else "OVER"
    if check.ties:
        said += f"; {check.ties} latent px between two codes, {check.otherwise} drawn as the other one"
    return said


if __name__ == "__main__":
    raise SystemExit(main())
