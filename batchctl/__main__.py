"""Lets `python -m batchctl` do what the installed command does."""

from __future__ import annotations

from batchctl.cli.app import main

if __name__ == "__main__":
    main()
