"""``python -m finecam`` is the command ``finecam``."""

from finecam.cli import main

if __name__ == "__main__":
    main()
