"""How far two pictures are apart: PSNR, SSIM and a picture of the difference (Pillow and numpy, the extra `demo`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from taylor_patch.errors import TaylorPatchError


def compare(first: Path, second: Path, difference: Path | None = None) -> dict[str, float]:
    """{"psnr_db", "ssim"} of two pictures of one size, on RGB in 0 to 255; PSNR is inf for equal ones.

    SSIM: Wang et al. 2004, mean over 8 x 8 windows at every second pixel, on luminance. difference: where to write 4 |a - b|.
    Raises TaylorPatchError where a picture cannot be read or the sizes differ.
    """
    try:
        import numpy as np
        from PIL import Image
    except ImportError:
        raise TaylorPatchError("compare needs Pillow and numpy: pip install taylor-patch[demo]") from None

    def pixels(path: Path) -> Any:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"), dtype=np.float64)
        except OSError as error:
            raise TaylorPatchError(f"{path} is not a picture that can be read ({error})") from None

    a, b = pixels(first), pixels(second)
    if a.shape != b.shape:
        raise TaylorPatchError(f"{first} is {a.shape[1]} x {a.shape[0]} and {second} is {b.shape[1]} x {b.shape[0]}: only pictures of "
                               "one size can be compared")
    error = float(np.mean((a - b) ** 2))
    if difference is not None:
        Image.fromarray(np.clip(4 * np.abs(a - b), 0, 255).astype(np.uint8)).save(difference)
    return {"psnr_db": math.inf if error == 0 else 10 * math.log10(255**2 / error), "ssim": _ssim(a, b)}


def _ssim(a: Any, b: Any) -> float:
    import numpy as np

    side = min(8, a.shape[0], a.shape[1])
    x, y = (np.lib.stride_tricks.sliding_window_view(image @ [0.299, 0.587, 0.114], (side, side))[::2, ::2] for image in (a, b))
    mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
    var_x, var_y = x.var((2, 3)), y.var((2, 3))
    covariance = (x * y).mean((2, 3)) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(ratio.mean())
