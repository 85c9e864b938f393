"""The commands: `python -m hvp_engine doctor` and `python -m hvp_engine demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    from hvp_engine import demo
    from hvp_engine.diagnostics import doctor
    from hvp_engine.errors import HvpError

    parser = argparse.ArgumentParser(prog="python -m hvp_engine", description="Implicit differentiation for PyTorch")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this installation can do, and why not the rest")
    demo.add_arguments(commands.add_parser("demo", help="tune one weight decay for every weight on MNIST digits"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "doctor":
            print(doctor.examine())
        else:
            demo.main(options)
    except HvpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
