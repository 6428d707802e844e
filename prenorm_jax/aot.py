"""Compiles a step for TPUs that are not there: `python -m prenorm_jax.aot --config=configs/gpt3_175b.py`."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import check_folder, json_bytes, write_results
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles and prints, for each norm that is named."""
    import jax  # here, as all that takes seconds

    from prenorm_jax.bench.compiled import HBM_GIB, compile_step, report_text, topology_devices
    from prenorm_jax.models.placement import MESH_AXES
    from prenorm_jax.train.checks import check_config
    from prenorm_jax.train.run import Run
    from prenorm_jax.train.sharding import sharding_table
    from prenorm_jax.train.workdir import configure_jax

    args, config = _parse(argv)
    logging.disable(logging.ERROR)  # jax tells of what is installed and found
    configure_jax(config)
    devices, reports = None, []
    if args.out:
        if Path(args.out).is_dir():
            raise PrenormError(f"--out={args.out} is a folder: name a file in it, such as {args.out}/aot.json")
        check_folder(Path(args.out).parent)
    for norm in args.norm.split(",") if args.norm else [config.model.norm]:
        config.model.norm = norm
        check_config(config)
        if args.parameters:  # no devices are needed to say how they are split
            shape = (1, config.mesh.fsdp, config.mesh.tensor)
            print(sharding_table(Run.create(config).trained, jax.sharding.AbstractMesh(shape, MESH_AXES)))
            continue
        devices = devices or topology_devices(args.topology)
        say(f"compiling {norm} for {args.topology}")
        reports.append(compile_step(config, devices))
        print(report_text(reports[-1], HBM_GIB.get(args.topology.split(":")[0])))
    if reports:
        print("memory, collectives and cycles: the TPU compiler's own figures, nothing was measured")
    if args.out:
        content = {"topology": args.topology, "jax": jax.__version__, "reports": reports}
        write_results({Path(args.out): json_bytes(content)})


def _parse(argv: Sequence[str] | None) -> tuple[Namespace, ConfigDict]:
    from prenorm_jax.train.flags import parse

    parser = Parser("python -m prenorm_jax.aot", __doc__, add_help=False)
    parser.add_argument("--topology", default="v5p:2x2x1", help="TPUs, as v5e:4x4, v5p:4x4x8 or v6e:8x8 (%(default)s)")
    parser.add_argument("--norm", help="norms to compile, with commas between them (default: the config's)")
    parser.add_argument("--parameters", action="store_true", help="only print how each is split; needs no libtpu")
    parser.add_argument("--out", type=place, help="a JSON file for all figures")

    def without(args: Namespace) -> ConfigDict:
        raise PrenormError("--config is missing: name a config file, such as --config=configs/gpt3_175b.py")

    return parse(parser, argv, without)


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
