"""The command ``idlora``: fine-tune a language model, see what changed, look inside an adapter, show what runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .version import __version__

# Fields of IdLoraConfig that are options of their own: name, type, help.
ADAPTER_OPTIONS = (
    ("r", int, "rank: rows chosen from each cluster (default 128)"),
    ("num_clusters", int, "clusters of rows, k (default 4); a layer needs k * r output features"),
    ("rank_boost", int, "rank-boost factor s (default 2): B is [d/s, r/s] and used s times"),
    ("scaling", float, "factor on the update (default 1.0)"),
    (
        "router",
        str,
        "form of the router: static (default), which can be merged and exported, linear (the paper's) or bounded",
    ),
    (
        "selection",
        str,
        "how rows are chosen: pivoted_qr_whole, the pivots of the whole weight (default), pivoted_qr in each cluster, "
        "nearest to each centroid (the paper's), sequential or random",
    ),
    ("preset", str, "paper: the paper's own method and, unless given, sizes, whatever the defaults are"),
    ("dropout", float, "probability of zeroing entries of z in training (default 0)"),
    ("rank_fit", str, "layers too narrow for k * r rows: shrink their rank (default) or error"),
    (
        "target_modules",
        str,
        "layers to adapt: names separated by commas, a regular expression, or all-linear (default)",
    ),
    ("exclude_modules", str, "layers to leave alone: names separated by commas, or a regular expression"),
)
ADAPTER_SWITCHES = (  # the same, with --no- before their names too
    ("shared_router", "one router vector for all clusters (default) or one for each"),
    ("row_scale", "give all chosen rows one norm (default: yes)"),
    ("center", "take out of the products with the rows what all tokens share (default: yes)"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"idlora: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the libraries, to their own callers
        warnings.showwarning = _show_warning
        try:
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            resumable = "output" in args and any(Path(args.output).glob("checkpoint-*"))
            hint = "; the same command with --resume goes on from the last checkpoint" if resumable else ""
            return _fail(f"interrupted{hint}", 130, kind="")
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if args.debug:
                raise
            message = " ".join(str(error).split())
            if not isinstance(error, (ValueError, TypeError, OSError, ImportError)) or not message:
                message = f"{type(error).__name__}: {message} (--debug shows where)"
            return _fail(message, 2)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. A new one is a function that adds its parser, listed here."""
    parser = Parser(
        prog="idlora",
        description="ID-LoRA: fine-tune a language model, see what changed, look inside an adapter.",
        epilog="idlora COMMAND --help tells more.",
    )
    parser.add_argument("--version", action="version", version=f"idlora_ext {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_finetune, _add_generate, _add_inspect, _add_export, _add_env):
        command = add(commands)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="on an error, show the traceback")
    return parser


def _add_finetune(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "finetune",
        help="train an adapter on text files",
        description="""Train an ID-LoRA adapter of a causal language model.

DATA are .txt files (one document each) and .jsonl files (one JSON object a line) with either a text or a prompt
and its completion. Plain text is joined with the end-of-text token and packed into rows of --length tokens; of
prompts with completions each is one row, and only the completion is learnt. A prompt is used as it stands: nothing
is put between it and the completion unless --chat wraps both in the model's chat template.

DIR receives the adapter (adapter_config.json, adapter_model.safetensors), the tokenizer, metrics.json, loss.png,
and checkpoints to resume from.""",
        epilog="""examples:
  idlora finetune ./model train.jsonl --output run --chat --epochs 2
  idlora finetune ./model novel.txt --output run --length 1024 --r 64 --target-modules q_proj,v_proj
  idlora finetune ./model novel.txt --output run --length 1024 --r 64 --target-modules q_proj,v_proj --resume""",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub name of the model")
    parser.add_argument("data", metavar="DATA", nargs="+", help=".jsonl or .txt files")
    parser.add_argument("--output", metavar="DIR", required=True, help="where checkpoints and results go")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the last checkpoint in DIR, or from the one named, with the options the run was started with "
        "(only --steps and --epochs may change)",
    )

    data = parser.add_argument_group("data")
    data.add_argument("--text-field", metavar="KEY", help="key of the text (default: text, content or document)")
    data.add_argument("--prompt-field", metavar="KEY", help="key of the prompt (default: prompt, question, ...)")
    data.add_argument(
        "--completion-field", metavar="KEY", help="key of the completion (default: completion, answer, ...)"
    )
    data.add_argument("--chat", action="store_true", help="wrap prompt and completion in the chat template")
    data.add_argument("--held-out", type=float, default=0.1, metavar="F", help="fraction held out (default 0.1)")
    data.add_argument("--held-out-file", metavar="FILE", help="held-out data of its own")
    data.add_argument("--length", type=int, default=512, help="most tokens in a row (default 512)")
    data.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="fill rows with several documents (default for plain text, refused for prompts with completions)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, default=3.0, help="passes over the data (default 3)")
    training.add_argument("--steps", type=int, help="steps to train, instead of epochs")
    training.add_argument("--batch", type=int, default=4, help="rows in a batch (default 4)")
    training.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="batches in a step")
    training.add_argument("--lr", type=float, default=3e-4, help="learning rate (default 3e-4)")
    training.add_argument(
        "--warmup", type=float, default=0.1, help="warm-up steps, or below 1 a fraction (default 0.1)"
    )
    training.add_argument(
        "--every", type=int, metavar="N", help="evaluate and checkpoint every N steps (default: a tenth)"
    )
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    training.add_argument("--seed", type=int, default=0, help="of split, row choice, order and dropout (default 0)")
    _add_dtype(training)
    _add_adapter_options(parser)
    parser.set_defaults(run=_finetune)
    return parser


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="answer prompts with and without an adapter",
        description="Continue prompts with the bare model and with the adapter, side by side.",
        epilog='example:\n  idlora generate ./model --adapter run --chat --prompt "What is 12 times 12?"',
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub name of the model")
    parser.add_argument("--adapter", metavar="DIR", required=True, help="directory of the adapter")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", metavar="FILE", help="further prompts, one a line")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the chat template, as in finetune --chat")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, if the temperature is above 0")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_dtype(parser)
    parser.set_defaults(run=_generate)
    return parser


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="look inside an adapter, or see what one would be",
        description="""Describe an adapter, or what an adapter of a model would be.

An adapter alone: its layers, ranks and sizes. With --base also what the chosen rows are of the rows of W. With
--base and --text also the router's weights a_i over that text. A model: what the adapter options would give, without
loading its weights. Layers are shown by kind; --layers lists each.""",
        epilog="""examples:
  idlora inspect run
  idlora inspect run --base ./model --text sample.txt --plot alpha.png
  idlora inspect ./model --r 64""",
    )
    parser.add_argument(
        "path", metavar="PATH", help="adapter directory or .safetensors file, or model directory or name"
    )
    parser.add_argument("--base", metavar="MODEL", help="the model the adapter was made from")
    parser.add_argument("--text", metavar="FILE", help=".txt or .jsonl file to run the model on")
    parser.add_argument("--chat", action="store_true", help="wrap the prompts of FILE in the chat template")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="read at most N tokens (default 4096)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the router's weights by layer and cluster")
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--json", action="store_true", help="print JSON, every layer and cluster")
    _add_adapter_options(parser)
    parser.set_defaults(run=_inspect)
    return parser


def _add_export(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write an adapter in another format",
        description="Write an adapter of router=static as a plain LoRA, which PEFT loads without this package.",
        epilog="example:\n  idlora export run --base ./model --to lora --output run-lora",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument("--base", metavar="MODEL", required=True, help="the model the adapter was made from")
    parser.add_argument("--to", choices=("lora",), required=True, help="the format")
    parser.add_argument("--output", metavar="DIR", required=True, help="where the LoRA goes; new or empty")
    parser.add_argument("--pad", action="store_true", help="fill up with zeros to a rank that vLLM can be started with")
    _add_dtype(parser)
    parser.set_defaults(run=_export)
    return parser


def _add_env(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "env",
        help="show what runs here: versions, native kernels, devices",
        description="Show versions, what the native module was built for, which kernel serves each op on each device, "
        "and why where it is the default one. Goes into a bug report.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_env)
    return parser


def _add_dtype(parser: Any) -> None:
    kinds = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, default="auto", help="of the frozen model (default: as it was saved)")


def _add_adapter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter (fields of IdLoraConfig)")
    for name, kind, text in ADAPTER_OPTIONS:
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    for name, text in ADAPTER_SWITCHES:
        group.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)


def _adapter_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given; the others keep IdLoraConfig's defaults."""
    fields = {name: getattr(args, name) for name, *_ in (*ADAPTER_OPTIONS, *ADAPTER_SWITCHES)}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in ("target_modules", "exclude_modules"):
        if re.fullmatch(r"[\w.,]+", fields.get(name, "")):  # names; anything else is all-linear or an expression
            fields[name] = fields[name].split(",")
    return fields


def _finetune(args: argparse.Namespace) -> None:
    _need_model(args.model)
    from .tools.finetune import Settings, finetune

    _quiet()
    options = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    metrics = finetune(Settings(**options, adapter=_adapter_fields(args))).metrics
    loss, perplexity = metrics["held_out_loss"], metrics["held_out_perplexity"]
    print(
        f"held-out loss {loss['before']:.4f} -> {loss['after']:.4f}, "
        f"perplexity {perplexity['before']:.3f} -> {perplexity['after']:.3f}\n"
        f"{metrics['seconds']:.0f} s of training at {metrics['tokens_per_second']:,.0f} tokens/s\n"
        f"written to {args.output}"
    )


def _generate(args: argparse.Namespace) -> None:
    _need_model(args.model)
    prompts = list(args.prompt)
    if args.prompt_file:
        prompts += [line for line in Path(args.prompt_file).read_text("utf-8").split("\n") if line.strip()]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt or --prompt-file")
    from transformers import AutoTokenizer

    from .tools.generation import compare, load_adapted

    _quiet()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_adapted(args.model, args.adapter, args.dtype)
    sampling = {"chat": args.chat, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    answers = compare(model, tokenizer, prompts, seed=args.seed, **sampling)
    print(json.dumps(answers, indent=2, ensure_ascii=False)) if args.json else print_answers(answers)


def _inspect(args: argparse.Namespace) -> None:
    if (args.text or args.plot) and not args.base:
        raise ValueError("the router's weights depend on the model: give --base with --text and --plot")
    if args.plot and not args.text:
        raise ValueError("the router's weights depend on what is read: give --text with --plot")
    path = Path(args.path)
    is_adapter = path.suffix == ".safetensors" or (path / "adapter_config.json").is_file()
    if not is_adapter:
        _need_model(args.path)
    for model in filter(None, [args.base]):
        _need_model(model)
    from .tools import inspection, inspection_report

    _quiet()
    fields = _adapter_fields(args)
    if not is_adapter:
        if args.base:
            raise ValueError(
                f"{args.path} holds no adapter (adapter_config.json), so there is nothing to put on --base"
            )
        report = inspection.inspect_model(args.path, **fields)
    elif fields:
        raise ValueError(f"{args.path} is an adapter: its {next(iter(fields))} is what it is")
    else:
        report = inspection.inspect_adapter(path, base=args.base, text=args.text, chat=args.chat, tokens=args.tokens)
    if args.plot:
        inspection_report.plot_alpha(report, args.plot)
    print(json.dumps(report, indent=2) if args.json else inspection_report.table(report, every_layer=args.layers))


def _export(args: argparse.Namespace) -> None:
    _need_model(args.base)
    if Path(args.output).exists() and any(Path(args.output).iterdir()):
        raise ValueError(f"{args.output}: is not empty, and an export replaces nothing: give another --output")
    from .layer.merging import MERGE_REFUSED
    from .lifecycle import to_lora
    from .tools.generation import load_adapted
    from .tuner.files import read_config

    _quiet()
    if read_config(args.adapter).router != "static":  # said before the model is loaded
        raise ValueError(f"{args.adapter}: {MERGE_REFUSED}")
    to_lora(load_adapted(args.base, args.adapter, args.dtype), args.output, pad=args.pad)
    print(f"written to {args.output}")


def _env(args: argparse.Namespace) -> None:
    from .tools import environment

    report = environment.report()
    print(json.dumps(report, indent=2) if args.json else environment.text(report))


def print_answers(answers: list[dict[str, str]]) -> None:
    """Side by side where there is room, else one below the other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    names = {"base": "without the adapter", "adapted": "with the adapter"}
    for answer in answers:
        console.print(Text(answer["prompt"], style="bold"))
        if console.width >= 100:
            table = Table(*names.values(), expand=True)
            table.add_row(*(Text(answer[key]) for key in names))
            console.print(table)
        else:
            for key, name in names.items():
                console.print(Text(f"--- {name}", style="dim"))
                console.print(Text(answer[key]))
        console.print()


def _need_model(name: str) -> None:
    """Say at once that a path is wrong, before it is taken for the name of a model on the hub."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise ValueError(f"{name}: no such model directory")


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading and saving take moments; training shows a bar of its own


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"idlora: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"idlora: {kind}{message}", file=sys.stderr)
    return code
