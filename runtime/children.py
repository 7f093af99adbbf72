"""Processes that another one starts to work for it."""

import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process within a second or so after its parent, the process of this number, even if that was killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
