"""Where a stage's time goes: starting, loading, computing, writing.

    lap("starting")     counts the time since the last lap, or since the process began, as that part

Wall clock, and seconds of CPUs: where others use the machine too, only these mean anything.
"""

import os
import time

seconds = {}  # {part: seconds}
cpu_seconds = {}  # {part: seconds of all threads of this process}


def age_of_process():
    """Seconds since this process began; 0 where the system does not say (it is Linux that does)."""
    try:
        with open("/proc/self/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds since the machine began
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError):
        return 0.0


last_time = time.monotonic() - age_of_process()
last_cpu_time = 0.0


def lap(part):
    """Count the time since the last lap as this part, which may come more than once."""
    global last_time, last_cpu_time
    now = time.monotonic()
    cpu_now = time.process_time()
    seconds[part] = seconds.get(part, 0) + now - last_time
    cpu_seconds[part] = cpu_seconds.get(part, 0) + cpu_now - last_cpu_time
    last_time = now
    last_cpu_time = cpu_now


def times():
    """Both, rounded, for a manifest."""
    return {
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "cpu_seconds": {part: round(value, 2) for part, value in cpu_seconds.items()},
    }
