"""`python app.py` that can be slowed, for tests that look at what happens meanwhile: nano is done in no time.

While the file exists that is named first, a step of a picture takes a second, and a model's loading waits.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uso.cli import main
from uso.serve import server
from uso.serve.engine import Engine, LoadProgress

SLOW = Path(sys.argv[1])


def pace(seconds: float = 1) -> None:
    began = time.monotonic()
    while SLOW.exists() and time.monotonic() - began < seconds:
        time.sleep(0.01)


class PacedEngine(Engine):
    def __init__(self, load: Callable[[LoadProgress], Any], **options: Any) -> None:
        def paced(progress: LoadProgress) -> Any:
            said = ""

            def report(text: str, fraction: float) -> None:
                nonlocal said
                progress(text, fraction)
                if text != said:
                    pace(120)
                said = text

            pipe = load(report)
            pipe.transformer.register_forward_pre_hook(lambda *_: pace())
            return pipe

        super().__init__(paced, **options)


if __name__ == "__main__":
    server.Engine = PacedEngine  # type: ignore[misc]
    sys.exit(main(["serve", *sys.argv[2:]]))
