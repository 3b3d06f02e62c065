"""Seeds that do not depend on what was computed before.
"""
import hashlib
import json


def derive_seed(*parts):
    """A seed in [0, 2^31) from a run's seed, the iteration and a prompt's id.

    vLLM gives the n samples of a request the seeds s, s+1, ..., so consecutive seeds would share samples; hashes do not.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1
