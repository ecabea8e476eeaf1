"""How well the cost line foretells: `python -m benchmarks.cost`.

Draws three pictures, then as many others as asked for, each with settings drawn at random, and compares what
was foretold of each before it began with what it took: once from the first three alone, as a new user has
it, and once from all before it. Prints a table for people; the last line is JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from PIL import Image

from uso.model.checkpoints import load_pipeline
from uso.schema import parse_request
from uso.serve.cost import Calibration, Cost
from uso.serve.device import Device
from uso.serve.work import Drawn, Sizes, Work
from uso.settings import get_settings

FIRST = 3
EXAMPLES = Path(__file__).parents[1] / "assets" / "examples"


def random_work(rng: random.Random) -> tuple[Work, Sizes]:
    """A picture as somebody may ask for it, and the sizes of what is given with it."""
    pictures = {
        name: Image.open(EXAMPLES / f"{picture}.jpg").convert("RGB")
        for name, picture in (("content_image", "fox"), ("style_image", "halftone"))
        if rng.random() < 0.7
    }
    width, height = rng.choice(((512, 512), (768, 768), (1024, 1024), (832, 1216), (1536, 1536)))
    request = parse_request({"prompt": f"a fox {rng.random()}", "num_steps": rng.randint(4, 50)})
    sizes = {name: picture.size for name, picture in pictures.items()}
    return Work.of(request, pictures, width=width, height=height, seed=rng.randrange(2**31)), sizes


def draw(device: Device, work: Work) -> Drawn:
    for event in device.run(work, cancelled=lambda: False):
        if isinstance(event, Drawn):
            return event
    raise AssertionError("no picture")


def error(cost: Cost, drawn: Drawn) -> tuple[float, float]:
    """Relative errors of seconds and of peak memory; the second is nan where nobody measures memory."""
    assert cost.seconds is not None
    seconds = sum(drawn.seconds.values())
    memory = cost.memory / drawn.peak - 1 if drawn.peak else float("nan")
    return cost.seconds / seconds - 1, memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pictures", type=int, default=20, help="after the first three (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = get_settings()
    device = Device(load_pipeline(args.model, settings=settings), device=args.device)
    rng = random.Random(args.seed)
    results: dict[str, list[tuple[float, float]]] = {"three pictures": [], "all before it": []}
    with tempfile.TemporaryDirectory() as folder:
        all_before, early = (Calibration(Path(folder) / name) for name in ("all.json", "three.json"))
        for number in range(FIRST + args.pictures):
            work, sizes = random_work(rng)
            demand = device.demand(work, sizes)
            costs = [one.predict(device.name, demand, device.in_use) for one in (early, all_before)]
            drawn = draw(device, work)
            if number < FIRST:
                early.learn(device.name, demand, drawn.seconds, drawn.peak)
            else:
                for rows, cost in zip(results.values(), costs, strict=True):
                    rows.append(error(cost, drawn))
            all_before.learn(device.name, demand, drawn.seconds, drawn.peak)
    print(f"{args.model} on {device.name}, {args.pictures} pictures")
    print(f"{'learned from':<16} {'seconds: median':>16} {'worst':>8} {'memory: median':>16} {'worst':>8}")
    summary = {}
    for name, rows in results.items():
        columns = [[abs(value) for value in column] for column in zip(*rows, strict=True)]
        figures = [figure(column) for column in columns for figure in (statistics.median, max)]
        print("{:<16} {:>16.1%} {:>8.1%} {:>16.1%} {:>8.1%}".format(name, *figures))
        summary[name] = dict(zip(("median", "worst", "memory_median", "memory_worst"), figures, strict=True))
    print(json.dumps({"benchmark": "cost", "model": args.model, "device": device.name, "errors": summary}))


if __name__ == "__main__":
    main()
