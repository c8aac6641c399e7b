"""Replicas that fail in a chosen way a few times, wherever they run, and are well otherwise."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from actors.denoiser_actor import Answer, DenoiserActor
from engine.sampling.denoiser import EncodeBatch, TileBatch

Sickness = Literal["killed", "hangs", "NaN", "wrong shape", "another batch's answer", "out of memory"]


def sick_actor(sickness: Sickness, tokens: Path, times: int, every: int = 2) -> type[DenoiserActor]:
    """Return a replica's class of which every second call fails, `times` times in all; a failure takes a token file."""
    tokens.mkdir()
    for number in range(times):
        (tokens / str(number)).touch()
    folder = str(tokens)

    def due() -> bool:
        """Take a token; of several processes only one gets each."""
        for token in Path(folder).iterdir():
            try:
                token.unlink()
            except FileNotFoundError:
                continue
            return True
        return False

    class SickActor(DenoiserActor):  # local, so that Ray ships it by value
        calls = 0

        def denoise(self, batch: TileBatch, float32: bool = False) -> Answer:
            self.calls += 1
            if self.calls % every or (sickness != "out of memory" and not due()):
                return super().denoise(batch, float32)
            if sickness == "out of memory":
                return self._starved(due, batch, float32)
            self._stop()
            answer = super().denoise(batch, float32)
            value: Any = answer.value
            broken = {
                "NaN": lambda: replace(value, x0=value.x0 * float("nan")),
                "wrong shape": lambda: replace(value, x0=value.x0[:, :, :32]),
                "another batch's answer": lambda: replace(value, key="joint/1/0/999"),
            }
            return replace(answer, value=broken[sickness]())

        def encode(self, batch: EncodeBatch, float32: bool = False) -> Answer:
            self.calls += 1
            if self.calls % every == 0 and sickness in ("killed", "hangs") and due():
                self._stop()
            return super().encode(batch, float32)

        def _stop(self) -> None:
            if sickness == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if sickness == "hangs":
                time.sleep(3600)

        def _starved(self, due: Callable[[], bool], batch: TileBatch, float32: bool) -> Answer:
            """Compute with a U-Net that finds no memory as long as there are tokens."""

            def no_memory(*_: object) -> None:
                if due():
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

            assert self._local is not None
            hook = self._local.model.unet.register_forward_pre_hook(no_memory)
            try:
                return super().denoise(batch, float32)
            finally:
                hook.remove()

    return SickActor
