"""``python -m ft_calibrate`` is the command ``ft-calibrate``."""

from ft_calibrate.cli import main

if __name__ == "__main__":
    main()
