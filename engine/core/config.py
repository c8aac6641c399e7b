"""Settings that several commands share: the model and the Ray cluster. Frozen, valid by construction.

It knows ranges and units, not models or files. Keys map 1:1 to fields and to command-line flags.
"""

from dataclasses import dataclass
from typing import Literal


def require(ok: bool, rule: str, came: object, do: str = "") -> None:
    """Raise ValueError, naming the rule, what came and what to do, unless `ok`."""
    if not ok:
        raise ValueError(f"{rule}; got {came!r}.{' ' + do if do else ''}")


@dataclass(frozen=True)
class ModelConfigSection:
    """Which weights, on which kind of device, in which arithmetic."""

    source: str = "demo"
    """"demo", a Hub id such as StonyBrook-CVLab/ZoomLDM, or a folder (LDM layout or ours)."""
    variant: str | None = None
    """Sub-folder of the source: brca or naip for the published weights."""
    encoder_source: str | None = None
    """Folder or Hub id of the SSL encoder; None takes the one the model was trained with."""
    cdm_source: str | None = None
    """Folder or published file of the CDM, for condition cdm; None takes the one in the model's folder."""
    text_source: str | None = None
    """Folder of the text prior, for --text; None takes the one in the model's folder."""
    text_tower_source: str | None = None
    """Folder with the weights and the tokenizer of the prior's text tower; None takes where they were published."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where replicas compute; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Arithmetic of the networks; the canvas is always float32. auto takes bfloat16 where the hardware multiplies it,
    else float32 (float16 on older GPUs), and keeps what a run began with."""
    channels_last: bool = True
    """Memory format of the convolutions; changes the last bits, so it is pinned with the run."""
    threads: int = 1
    """CPU threads of each replica; pinned, because it changes the last bits."""

    def __post_init__(self) -> None:
        require(self.threads >= 1, "model.threads must be at least 1", self.threads)


@dataclass(frozen=True)
class RayConfig:
    """Replicas and patience. None of these keys changes a byte of the picture."""

    enabled: bool = True
    """False computes in this process, without Ray."""
    address: str | None = None
    """Address of a running cluster; None starts or joins one as Ray would."""
    replicas: int | None = None
    """Model replicas; None takes every GPU, or one replica on CPUs."""
    gpus_per_replica: float = 1.0
    """GPU share of a replica when computing on GPUs."""
    in_flight: int = 2
    """Batches queued per replica."""
    batch_timeout_s: float = 600.0
    """A batch that takes longer counts as lost, and its replica is replaced."""
    start_timeout_s: float = 300.0
    """Patience for the first replica to be ready."""
    max_attempts: int = 4
    """Evaluations of one batch before the run stops."""

    def __post_init__(self) -> None:
        require(self.replicas is None or self.replicas >= 1, "ray.replicas must be at least 1", self.replicas)
        require(self.gpus_per_replica > 0, "ray.gpus_per_replica must be positive", self.gpus_per_replica)
        require(self.in_flight >= 1, "ray.in_flight must be at least 1", self.in_flight)
        require(self.batch_timeout_s > 0, "ray.batch_timeout_s must be positive", self.batch_timeout_s)
        require(self.start_timeout_s > 0, "ray.start_timeout_s must be positive", self.start_timeout_s)
        require(self.max_attempts >= 1, "ray.max_attempts must be at least 1", self.max_attempts)
