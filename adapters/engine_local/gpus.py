"""Who has which GPU of this machine.

A table without any I/O beyond `visible_devices`; only the controller's loop touches it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from engine.errors import InvalidArgument, ResourcesUnavailable

__all__ = ["GpuTable", "visible_devices"]

_WHOLE = 10_000
"""Shares are counted in ten-thousandths, so that ten times 0.1 is exactly one device."""


def visible_devices(environ: Mapping[str, str]) -> list[str]:
    """List the devices this process may use: those of ``CUDA_VISIBLE_DEVICES``, or all that the driver shows."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = []
        for device in map(str.strip, visible.split(",")):
            if not device or device == "-1":
                break  # CUDA, too, ignores what follows an invalid entry
            devices.append(device)
        return devices
    try:
        entries = os.listdir("/dev")
    except OSError:
        return []
    return sorted((match[1] for entry in entries if (match := re.fullmatch(r"nvidia(\d+)", entry))), key=int)


class GpuTable:
    """Hands out devices and shares of them.

    Args:
        devices: Their names as ``CUDA_VISIBLE_DEVICES`` takes them.

    Raises:
        engine.errors.InvalidArgument: A device is named twice.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        if len(set(devices)) != len(devices):
            raise InvalidArgument(f"gpus: a device is named twice in {list(devices)!r}")
        self._free = dict.fromkeys(devices, _WHOLE)
        self._taken: dict[str, list[tuple[str, int]]] = {}

    def take(self, holder: str, amount: float) -> list[str]:
        """Reserve devices for a holder until it gives them back.

        Args:
            holder: Who gets them; may hold only one reservation.
            amount: Whole devices, or a share of one.

        Raises:
            engine.errors.InvalidArgument: More than one device, but not a whole number of them.
            engine.errors.ResourcesUnavailable: They are not free.
        """
        need = max(1, round(amount * _WHOLE))
        if need > _WHOLE and need % _WHOLE:
            raise InvalidArgument(f"num_gpus must be a whole number or a share below 1, not {amount!r}")
        chosen = self._choose(need)
        if chosen is None:
            raise ResourcesUnavailable(self._refusal(amount))
        share = min(need, _WHOLE)
        self._taken[holder] = [(device, share) for device in chosen]
        for device in chosen:
            self._free[device] -= share
        return chosen

    def give_back(self, holder: str) -> None:
        """End a holder's reservation, if it has one."""
        for device, share in self._taken.pop(holder, ()):
            self._free[device] += share

    def _choose(self, need: int) -> list[str] | None:
        if need >= _WHOLE:
            whole = [device for device, free in self._free.items() if free == _WHOLE]
            count = need // _WHOLE
            return whole[:count] if len(whole) >= count else None
        # The fullest device that still has room: it keeps the others whole.
        fitting = [(free, place, device) for place, (device, free) in enumerate(self._free.items()) if free >= need]
        return [min(fitting)[2]] if fitting else None

    def _refusal(self, amount: float) -> str:
        if not self._free:
            return f"num_gpus={amount:g} was asked for, but this machine shows no GPU (see LocalAdapter(gpus=...))"
        free = ", ".join(f"{device}: {left / _WHOLE:g}" for device, left in self._free.items())
        return f"num_gpus={amount:g} was asked for; of {len(self._free)} GPUs there is free: {free}"
