"""Processes that another one starts to work for it."""

import multiprocessing
import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process within a second or so after its parent, the process of this number, even if that was killed.

    On Windows only processes of multiprocessing know when their parent ends.
    """
    def watch():
        if os.name != "nt":
            while os.getppid() == parent:
                time.sleep(1)
        elif started := multiprocessing.parent_process():
            started.join()  # on Windows getppid() stays what it was
        else:
            return
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
