"""One side of `step_beside.py`: the training step of the checkout that is named, measured when it is asked to.

    python benchmarks/step_beside_process.py TREE CONTENDER,... [options of TREE's training_step.py]

Each line of its input names a contender, for one round. Each answer is a line of JSON that begins with "@", since
libraries print to the same place: first the losses of the first step, then seconds a step of each round.
"""

import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    tree, names, *arguments = sys.argv[1:]
    sys.path[:1] = [f"{tree}/benchmarks", tree]  # in place of this file's folder
    from data_pipeline import open_set, pin, read_once
    from step_contenders import PLAIN, Builder, run_round
    from step_images import link_tree, make_recipe, override_recipe
    from timing import cpu_seconds
    from training_step import FAST, PRESETS, check_options, make_parser, start_cluster

    options = make_parser().parse_args(arguments)
    check_options(options)
    with tempfile.TemporaryDirectory(prefix="step_beside_") as name:
        folder = Path(name)
        read_once(open_set(options.root, options.images))
        images = max(options.images, options.batch_size)
        linked = link_tree(folder / "tree", options.root, images, options.classes)
        sizes = {name: getattr(options, name) for name in PRESETS[options.device]}
        config = make_recipe(folder, linked, {**sizes, "device": options.device})
        fast = FAST | dict(override.split("=", 1) for override in options.fast)
        pin(options.cores)
        builder = Builder(config, override_recipe(config, fast), start_cluster(options.device))
        builder.build(PLAIN)  # with whose weights all begin
        contenders = {name: builder.build(name) for name in names.split(",")}
        print("@" + json.dumps(builder.losses), flush=True)
        for line in sys.stdin:
            contender, taken = contenders[line.strip()], 0
            step = contender.step

            def counted(step=step) -> None:
                nonlocal taken
                taken += 1
                step()

            contender.step, spent = counted, cpu_seconds()
            one = run_round(contender, options.round_seconds, builder)
            contender.step, spent = step, cpu_seconds() - spent
            print("@" + json.dumps({"wall": one.seconds / one.steps, "cpu": spent / taken}), flush=True)


if __name__ == "__main__":
    main()
