"""``python -m meda_kv.cli``, the same as ``python -m meda_kv``."""

from meda_kv.cli import main

main()
