"""Runs long batches and exact rollups from cron."""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    # Reading the installed version costs about 20 ms, which a command that starts every minute need not pay.
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - see above

        return version("batchctl")
    raise AttributeError(name)
