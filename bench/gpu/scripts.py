"""The project's scripts, started as their users start them."""

import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Run:
    """A script in a process of its own. What it prints goes to stderr when it has ended."""

    def __init__(self, script, name, on_cpu=False, **settings):
        """Start it with these settings.

        name: of what it writes, in a new folder. on_cpu: hide the GPU from it.
        """
        self.script = script
        self.out = os.path.join(tempfile.mkdtemp(), name)
        self.command = [sys.executable, os.path.join(ROOT, script), f"--out={self.out}"]
        self.command += [f"--{key}={value}" for key, value in settings.items()]
        self.env = dict(os.environ)
        if on_cpu:
            self.env["CUDA_VISIBLE_DEVICES"] = ""
        self.start()

    def start(self):
        """Start it; a second time, it goes on where it was."""
        with open(f"{self.out}.log", "w") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self):
        """Wait for its end; raises RuntimeError if it has failed."""
        status = self.process.wait()
        print(self.log(), file=sys.stderr)
        if status != 0:
            self.raise_error(f"ended with status {status}")

    def wait_for(self, condition):
        """Wait until a function of nothing is true; raises RuntimeError if the run ends before."""
        while not condition():
            if self.process.poll() is not None and not condition():
                print(self.log(), file=sys.stderr)
                self.raise_error("ended too soon")
            time.sleep(0.02)

    def kill(self):
        """End it at once."""
        self.process.kill()
        self.process.wait()
        print(self.log(), file=sys.stderr)

    def log(self):
        """What it has printed since its last start."""
        with open(f"{self.out}.log", encoding="utf-8", errors="replace") as f:
            return f.read()

    def raise_error(self, reason):
        """Raise RuntimeError with the last line that it printed."""
        last = self.log().strip().splitlines()[-1:]
        raise RuntimeError(f"{self.script} {reason}: {' '.join(last)}")
