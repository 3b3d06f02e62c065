"""PairRM with the GPU's kernel, interpreted on a CPU: python tests/pairrm_on_kernel.py JUDGE

test_pairrm_device.py runs it, in a process of its own because TRITON_INTERPRET has to be set before
Triton is imported. Prints as JSON how far, at most, log-odds are from those of the CPU's attention:
as the kernel is, and with mistakes in the buckets that it reads.
"""

import collections
import functools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from test_rank import largest_difference, random_prompts

from nanoaipo import pairrm, pairrm_kernel


def main():
    torch.backends.mkldnn.is_available = lambda: False  # as on a GPU: plain layers
    model, tokenizer = pairrm.load_pairrm(sys.argv[1], torch.device("cpu"))
    prompts, candidates = random_prompts(2, 6, 2, 60)

    def compare(fused):
        model.fused = fused
        return pairrm.compare(model, tokenizer, prompts, candidates, 2000, collections.Counter())

    exact = compare(fused=False)
    differences = {"as it is": largest_difference(compare(fused=True), exact)}

    lay_out = pairrm_kernel.lay_out
    n_tiles = []

    def lay_out_wrongly(change, *arguments):
        sequences = lay_out(*arguments)
        n_tiles.append(sequences.n_tiles)
        return change(sequences)

    wrong = {
        "queries and keys exchanged": lambda s: s._replace(by_query=s.by_key, by_key=s.by_query),
        "the neighbouring tile": lambda s: s._replace(by_query=s.by_query.roll(1, 0)),
        "tiles in reverse": lambda s: s._replace(by_key=s.by_key.flip(0)),
    }
    for mistake, change in wrong.items():
        pairrm_kernel.lay_out = functools.partial(lay_out_wrongly, change)
        differences[mistake] = largest_difference(compare(fused=True), exact)
    assert max(n_tiles) > 2  # tiles on both sides of the diagonal, and not next to it
    print(json.dumps({name: float(difference) for name, difference in differences.items()}))


if __name__ == "__main__":
    main()
