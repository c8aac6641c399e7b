"""Pictures as networks take them and back, and how far two of them are apart."""

import numpy as np
import torch
from torch import Tensor


def as_images(pictures: list[np.ndarray]) -> Tensor:
    """Return uint8 (h, w, 3) pictures as float32 (B, 3, h, w) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return stacked.float() / 127.5 - 1


def as_pictures(images: Tensor) -> np.ndarray:
    """Return float (B, 3, h, w) in [-1, 1] as uint8 (B, h, w, 3)."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def psnr(mse: float) -> float:
    """Return dB for a mean squared error of pictures in [-1, 1]."""
    return float(10 * np.log10(4.0 / max(mse, 1e-12)))
