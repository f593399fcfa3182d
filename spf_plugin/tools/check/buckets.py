"""Which sizes the host trains at: its rule of buckets, and the limits that it refuses.

`BucketManager` and `make_bucket_resolutions` of sd-scripts (v0.9.1 to v0.11.1), restated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

Size = tuple[int, int]
_MOST = 10_000  # steps between the limits: of more the host would make buckets for hours


@dataclass(frozen=True)
class Buckets:
    """What decides the size at which an image of a data set is trained.

    Attributes:
        resolution: width and height.
        enabled: `enable_bucket`; without it every image is trained at `resolution`.
        lowest: `min_bucket_reso`.
        highest: `max_bucket_reso`.
        step: `bucket_reso_steps`.
        no_upscale: `bucket_no_upscale`: an image's own size, cut to steps, unless it is too large.
    """

    resolution: Size
    enabled: bool = False
    lowest: int = 256
    highest: int = 1024
    step: int = 64
    no_upscale: bool = False

    def problem(self) -> str:
        """Why the host does not take them; empty where it does."""
        width, height = self.resolution
        if min(width, height) < 1:
            return f"resolution {width},{height} is no size"
        if not self.enabled:
            return ""
        if self.step < 1:
            return f"bucket_reso_steps is {self.step}"
        lowest, highest = self._limits()
        if lowest > min(width, height):
            return f"min_bucket_reso {self.lowest} is above the resolution {width},{height}"
        if highest < max(width, height):
            return f"max_bucket_reso {self.highest} is below the resolution {width},{height}"
        if lowest < 1 and not self.no_upscale:
            return f"min_bucket_reso {self.lowest} is below bucket_reso_steps {self.step}: no width is left"
        if not self.no_upscale and (highest - lowest) // self.step > _MOST:
            return f"{self.lowest} to {self.highest} in steps of {self.step} are more buckets than anybody can use"
        return ""

    def _limits(self) -> tuple[int, int]:
        """The lowest and the highest as whole steps: down, and up."""
        return self.lowest - self.lowest % self.step, -(-self.highest // self.step) * self.step

    @cached_property
    def sizes(self) -> list[Size]:
        """The buckets that images are sorted into, unless `no_upscale`."""
        if not self.enabled:
            return [self.resolution]
        lowest, highest = self._limits()
        area = self.resolution[0] * self.resolution[1]
        square = int(math.sqrt(area) // self.step) * self.step
        found = {(square, square)}
        for width in range(lowest, highest + 1, self.step):
            height = min(highest, area // width // self.step * self.step)
            if height >= lowest:
                found |= {(width, height), (height, width)}
        return sorted(found)

    def of(self, size: Size) -> Size | None:
        """The bucket of an image of this size; None where the host fails on it: it has no whole step."""
        width, height = size
        ratio = width / height
        if not (self.enabled and self.no_upscale):
            among = self.sizes
            return size if size in among else min(among, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))
        area = self.resolution[0] * self.resolution[1]
        try:
            resized = self._shrunk(area, ratio) if width * height > area else size
        except ZeroDivisionError:
            return None
        bucket = (resized[0] // self.step * self.step, resized[1] // self.step * self.step)
        return bucket if min(bucket) > 0 else None

    def _shrunk(self, area: int, ratio: float) -> Size:
        """An image that is too large, with its shape: the side that loses less is a whole number of steps."""
        wide = math.sqrt(area * ratio)
        width, height = self._rounded(wide), self._rounded(area / wide)
        by_width = width / self._rounded(width / ratio)
        by_height = self._rounded(height * ratio) / height
        if abs(by_width - ratio) < abs(by_height - ratio):
            return width, int(width / ratio + 0.5)
        return int(height * ratio + 0.5), height

    def _rounded(self, side: float) -> int:
        whole = int(side + 0.5)
        return whole - whole % self.step
