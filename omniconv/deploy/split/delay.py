"""How long an image takes from device to answer over a slow link, and below which bandwidth another way is faster."""

from dataclasses import dataclass

__all__ = ["Route", "crossover"]


@dataclass(frozen=True)
class Route:
    """A way to an answer: compute on both sides, and bytes between them.

    Attributes:
        device_s: seconds on the device.
        sent_bytes: from device to server; 0 where the device does everything.
        server_s: seconds on the server.
        round_trip_s: seconds that the first byte and the answer are under way.
        sent_share: share of the images that are sent; the others end on the device.
    """

    device_s: float
    sent_bytes: float
    server_s: float = 0.0
    round_trip_s: float = 0.0
    sent_share: float = 1.0

    @property
    def fixed_s(self) -> float:
        """Seconds that no bandwidth changes, on average."""
        return self.device_s + self.sent_share * (self.server_s + self.round_trip_s)

    def delay(self, bits_per_s: float) -> float:
        """Return the seconds from image to answer over a link, on average.

        Raises:
            ValueError: if the bandwidth is not positive.
        """
        if bits_per_s <= 0:
            raise ValueError(f"bits_per_s must be positive: got {bits_per_s}")
        return self.fixed_s + self.sent_share * self.sent_bytes * 8 / bits_per_s


def crossover(small: Route, large: Route) -> float | None:
    r"""Return the bandwidth in bits a second below which `small`, which sends less, is the faster one.

    .. math:: B = \frac{8\,(b_\mathrm{large} - b_\mathrm{small})}{t_\mathrm{small} - t_\mathrm{large}}

    with bytes b and the times t that do not depend on the bandwidth. None if `small` is faster at any bandwidth.

    Raises:
        ValueError: if `small` does not send less.
    """
    saved = large.sent_share * large.sent_bytes - small.sent_share * small.sent_bytes
    if saved <= 0:
        raise ValueError(f"the first route must send less than the second: it sends {-saved:g} bytes more")
    slower = small.fixed_s - large.fixed_s
    return 8 * saved / slower if slower > 0 else None
