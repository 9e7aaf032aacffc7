"""What ends a run before its end: a signal, or numbers that are not finite."""

import os
import signal
import threading
from contextlib import contextmanager, suppress


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved itself. signal: the signal's number."""

    everywhere = True  # raised on all ranks alike

    def __init__(self, signum, step):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signal, self.step = signum, step


class Diverged(ArithmeticError):
    """The loss, a gradient or a parameter is not finite; the last good checkpoint stays."""

    everywhere = True  # raised on all ranks alike


def diverged(finding, step, epoch, last):
    """The Diverged that says what was found in this step (from 0) of this epoch (from 0).

    last: the path of the run's last.safetensors, whether it is there or not.
    """
    advice = f"{last} is the last good checkpoint" if last.exists() else "nothing was saved yet"
    return Diverged(
        f"stopped at step {step + 1} (epoch {epoch + 1}): {finding}; {advice}; "
        "a smaller --lr, a longer --warmup-epochs or --clip-grad 1 may help"
    )


@contextmanager
def note_signals(requests):
    """While it lasts, the first SIGINT, SIGTERM or SIGHUP is put into `requests`; a second has its
    usual effect at once. A SIGHUP that is ignored, as under nohup, stays so. Elsewhere than in the
    main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {}

    def note(signum, frame):
        requests.append(signum)
        restore()
        # Not through sys.stderr, which may be in the middle of a write of its own. The reader of a
        # pipe may have been stopped by the same Ctrl-C.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step, then saving (ask again to stop at once)\n")

    def restore():
        for signum, handler in usual.items():
            signal.signal(signum, handler)

    signals = {signal.SIGINT, signal.SIGTERM}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.add(signal.SIGHUP)
    for signum in signals:
        usual[signum] = signal.signal(signum, note)
    try:
        yield
    finally:
        restore()
