"""Text from a GPT: `python -m prenorm_jax.generate runs/ln --prompt="def main"`.

Where its tokenizer lies now is said as to train.py: --config.data.tokenizer=FILE. An imported checkpoint begins and
ends texts as its source does; without a tokenizer it takes --prompt-ids.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.flags import Parser, place

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from prenorm_jax.interop.tokens import Ends
    from prenorm_jax.models.continuation import Convention
    from prenorm_jax.models.decoding import generate

__all__ = ["generate", "main"]  # the first is the Python interface


def __getattr__(name: str) -> Any:
    if name != "generate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prenorm_jax.models.decoding import generate  # on first use: what it needs takes seconds to import

    return generate


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, generates, prints. Raises PrenormError."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)

    from prenorm_jax.interop.tokens import ends_of  # here, as all that takes seconds
    from prenorm_jax.models.continuation import write_texts
    from prenorm_jax.models.decoding import as_read
    from prenorm_jax.models.registry import build_model, family
    from prenorm_jax.models.sampling import Sampling
    from prenorm_jax.train.evaluation import load_as
    from prenorm_jax.train.flags import override
    from prenorm_jax.train.workdir import PLACES, configure_jax, load_config

    if args.prompt and args.prompt_ids:
        raise PrenormError("--prompt and --prompt-ids exclude each other: give texts, or ids")
    prompts = args.prompt_ids or args.prompt or [""]
    sys.stdout.reconfigure(encoding="utf-8")

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    config = load_config(args.workdir)
    override(config, rest, parser, PLACES)
    if not family(config.model.family).config_class.decodes:
        kind, other = f"a {config.model.family}", ""
        if config.model.family == "encoder":
            kind, other = "an encoder", "; it fills masks and gives embeddings from Python (docs/checkpoints.md)"
        raise PrenormError(f"{args.workdir} is the run of {kind}: only a gpt writes text{other}")
    configure_jax(config)
    norm = args.norm or config.model.norm
    metadata, model, params = load_as(args.workdir, norm, args.step)
    step, params = metadata["step"], as_read(params, model)
    ends = ends_of(args.workdir)
    convention = _convention(args, config, metadata, ends)

    streamed = len(prompts) == 1 and not args.json
    show = functools.partial(print, end="", flush=True) if streamed else lambda text: None
    results = write_texts(build_model(model), params, convention, prompts, args.tokens, sampling, args.seed, show)
    if streamed:
        print()
    elif args.json:
        texts = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"workdir": args.workdir, "step": step, "norm": norm, "texts": texts}))
    else:
        for i, result in enumerate(results, 1):
            print(f"--- {i} of {len(results)}, {result.tokens} tokens\n{result.prompt}{result.text}")
    full = [str(i) for i, result in enumerate(results, 1) if result.end == "max_len"]
    if full:
        which = f" (prompt {', '.join(full)})" if len(prompts) > 1 else ""
        say(f"stopped where model.max_len={model.max_len} is full{which}")
    if ends and ends.otherwise:
        say(f"its source would also heed {', '.join(ends.otherwise)} (generation_config.json), which is left out here")


def _convention(
    args: argparse.Namespace, config: ConfigDict, metadata: dict[str, Any], ends: Ends | None
) -> Convention:
    """How the run's texts begin and end: as in training, or as its source has it (`ends`). Raises PrenormError."""
    from prenorm_jax.data.tokenizer import check_vocab_size, load_tokenizer
    from prenorm_jax.models.continuation import of_documents, of_ids, of_tokenizer
    from prenorm_jax.train.restore import check_vocabulary

    if ends and args.prompt_ids:
        found = of_ids(ends.end)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
        check_vocab_size(tokenizer.vocab_size, config)
        check_vocabulary(metadata, tokenizer.vocabulary, f"{args.workdir} at step {metadata['step']}")
        found = of_tokenizer(tokenizer, ends.begin, ends.end) if ends else of_documents(tokenizer)
        if args.prompt_ids:
            found = of_ids(found.ends)
    return dataclasses.replace(found, ends=()) if args.ignore_eos else found


def _parser() -> Parser:
    parser = Parser("python -m prenorm_jax.generate", __doc__)
    parser.add_argument("workdir", type=place, help="folder of a run, or of a converted checkpoint")
    parser.add_argument(
        "--prompt", action="append", help="what the text begins with (default: nothing); may be repeated"
    )
    parser.add_argument(
        "--prompt-ids", action="append", help="ids in place of a text, as 15496,11,995; what follows is ids then, too"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind an end-of-text token")
    parser.add_argument("--tokens", type=int, default=100, help="how many new ones, at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens of probability p together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--norm", help="layernorm, rmsnorm or crmsnorm: convert first (default: the run's own)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
