"""Live comparison runs where the parity extra is installed, and says plainly when it is not."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob.append("reference.py")
