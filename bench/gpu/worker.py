"""Runs checks one after another: python -m bench.gpu.worker RESULTS DEADLINE NAME=SECONDS ...

Prints each check's outcome and appends it to RESULTS. A check that raises may have left the device
in any state, so this process ends behind it; the driver (__main__.py) starts another for the rest.
A check that takes far longer than its seconds is ended with the process, and status 1.
"""

import faulthandler
import importlib
import os
import sys
import time
import traceback

from bench.gpu.report import Report, Skip, write_down
from nanoaipo.errors import reason_of


def main():
    results, deadline, *arguments = sys.argv[1:]
    deadline = float(deadline)

    # the first use of the device can hang too
    faulthandler.dump_traceback_later(max(0, deadline - time.time()) + 10, exit=True)
    from bench.gpu import device

    for argument in arguments:
        name, seconds = argument.split("=")
        record, raised = run_check(name, float(seconds), deadline, device)
        write_down(record, results)
        if raised:
            break
    sys.stderr.flush()
    os._exit(0)  # without waiting for the threads of libraries


def run_check(name, seconds, deadline, device):
    """(The record of one check, whether it raised an error).

    name: of a function, with its module. deadline: in seconds since 1970. device: that module.
    """
    record = {"name": name, "status": "PASS", "seconds": 0}
    left = deadline - time.time()
    if left < seconds:
        record["status"] = "SKIP"
        record["reason"] = f"it takes {seconds:.0f} s, and {left:.0f} s are left"
        return record, False

    # writes where it hung to stderr, and ends the process, even within a call that never returns
    faulthandler.dump_traceback_later(min(3 * seconds + 20, left + 10), exit=True)
    print(f"---- {name}", file=sys.stderr, flush=True)
    report = Report()
    raised = False
    t0 = time.time()
    try:
        module, _, function = name.rpartition(".")
        getattr(importlib.import_module(module), function)(report)
        device.wait()  # an error on the device shows itself here
        device.empty_cache()
    except Skip as e:
        record["status"] = "SKIP"
        record["reason"] = str(e)
    except Exception as e:  # a check may fail in any way
        traceback.print_exc()
        record["status"] = "FAIL"
        record["reason"] = f"{type(e).__name__}: {reason_of(e)}"
        raised = True
    faulthandler.cancel_dump_traceback_later()

    wrong = report.wrong()
    if wrong and not raised:
        record["status"] = "FAIL"
        record["reason"] = "; ".join(wrong)
    record["seconds"] = round(time.time() - t0, 1)
    record["figures"] = report.figures()
    record["measured"] = report.measured
    return record, raised


if __name__ == "__main__":
    main()
