"""``python -m dlmom_rs``: the same command as ``dlmom-rs``."""

from dlmom_rs.cli import main

if __name__ == "__main__":
    main()
