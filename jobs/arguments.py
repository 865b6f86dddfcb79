"""The words of the command line: verbs, their options and examples, and the exit codes."""

import argparse
import math

EXIT_CODES = {
    0: "complete",
    1: "a mistake of k2batch itself: please report it",
    2: "the job file or the command line is wrong",
    3: "data breaks the contract",
    4: "environment, checkpoint or storage",
    5: "incomplete: stopped by a deadline, a budget or a signal, or not proven",
    6: "more rejected rows than [limits] max_reject_rate",
}
INCOMPLETE = 5

EXAMPLES = {
    "plan": "k2batch plan jobs/specs/hate_sweep.toml",
    "run": "k2batch run jobs/specs/hate_sweep.toml",
    "status": "k2batch status annotated/hate-sweep-*",
    "batch": "k2batch batch -i jobs/samples/requests.jsonl -o answers.jsonl",
    "verify": "k2batch verify annotated/hate-sweep-*",
    "report": "k2batch report annotated/hate-sweep-*",
    "eval": "k2batch eval jobs/specs/moderation_sweep.toml --truth jobs/samples/labelled.parquet",
    "cache": "k2batch cache annotated/ --max-gb 5",
    "models": "k2batch models inspect smollm2-135m-instruct",
    "sparsify": "k2batch sparsify my-moe.toml --rows 8 -o thresholds.json",
    "compress": "k2batch compress jobs/recipes/tiny.toml",
    "doctor": "k2batch doctor",
    "bench": "k2batch bench linear --rounds 3",
}
"""Shown in each verb's help, and run by a test."""

_ABOUT = {
    "plan": "Say what a run would do: files, rows, tokens before and after sharing, rejects. Writes nothing.",
    "run": "Annotate every row of a job's input. Running again resumes, and costs nothing once complete.",
    "status": "Say how far a run is, from its receipts. Exits as the run would: 0 once it is complete.",
    "batch": "Answer a batch file of OpenAI's requests: chat, completions, moderations. Running again resumes.",
    "verify": "Prove from the files alone that every input row is in the output once; with --replay, its answers too.",
    "report": "Write report.html into a finished run, and show it in short.",
    "eval": "Run a job on labelled files and say how often it is right: accuracy, F1, calibration, with intervals.",
    "cache": "Say how many answers are kept for later runs, and delete those that were not used for longest.",
    "models": "Look into a checkpoint before fetching it, compare it with reference fixtures, or convert it to INT8.",
    "sparsify": "Find which experts a job's own tickets can do without, for [model] router_thresholds.",
    "compress": "Make a smaller model for your labels by a recipe: tune, prune, distill, quantize. Again = go on.",
    "doctor": "Check this machine and installation.",
    "bench": "Measure kernels, what INT8 loses, the engine, a true-size K2 layer, a conversion, the flow, large plans.",
}

_MEASURED = {
    "kernels": "kernels: each beside its limit and its peer",
    "linear": "linear: INT8 layers beside bfloat16",
    "quality": "quality: what INT8, or another precision, loses",
    "engine": "engine: tickets per second, beside peers on the same work",
    "layer": "layer: one of Kimi-K2 at its true size",
    "conversion": "conversion: a checkpoint larger than memory",
    "flow": "flow: all but the model, per row and per unit",
    "scale": "scale: what handles a whole plan, time and memory",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    codes = "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="k2batch",
        description="Annotate every row of Parquet tickets with an INT8 language model, once, the same tomorrow.",
        epilog=f"exit codes:\n{codes}\n\nexample:\n  {EXAMPLES['run']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    made = {}
    for verb, about in _ABOUT.items():
        made[verb] = verbs.add_parser(
            verb,
            help=about,
            description=about,
            epilog=f"example:\n  {EXAMPLES[verb]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made[verb].add_argument("--json", action="store_true", help="end stdout with one JSON object")
    for verb in ("plan", "run", "eval"):
        _add_job_arguments(made[verb], verb)
    _add_eval_arguments(made["eval"])
    _add_limit_arguments(made["run"])
    for verb in ("run", "eval", "batch"):
        _add_progress_arguments(made[verb])
    _add_sparsify_arguments(made["sparsify"])
    for verb in ("status", "verify", "report"):
        made[verb].add_argument("run", metavar="RUN", help="the run's folder or URL: <output>/<run_id>")
    made["cache"].add_argument("output", metavar="OUTPUT", help="the jobs' [output] url")
    made["cache"].add_argument(
        "--max-gb", type=_size, metavar="X", default=math.inf, help="delete until these are left; 0 for all"
    )
    made["report"].add_argument(
        "--against", metavar="RUN", default="", help="count labels changed since this run, not since the one before"
    )
    made["verify"].add_argument(
        "--replay", type=_count, metavar="N", default=0, help="compute N random rows again, each alone: the same bits?"
    )
    made["verify"].add_argument("--seed", type=int, metavar="S", default=0, help="draws other rows (0)")
    _add_compress_arguments(made["compress"])
    _add_bench_arguments(made["bench"])
    _add_models_arguments(made["models"])
    _add_batch_arguments(made["batch"])
    return parser


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truth", nargs="+", metavar="URL", required=True, help="labelled Parquet: the tickets, and their labels"
    )
    parser.add_argument(
        "--column",
        action="append",
        metavar="TASK=COLUMN",
        default=[],
        help="where a task's true labels are (the column of the task's name; with one task, `label` will do)",
    )
    parser.add_argument(
        "--repeats", type=_count, metavar="N", default=0, help="draw N samples of rows: median and standard deviation"
    )
    parser.add_argument(
        "--sample", type=_count, metavar="K", default=0, help="rows of each sample (as many as there are)"
    )


def _add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", dest="source", metavar="URL", required=True, help="requests, one JSON object a line")
    parser.add_argument("-o", dest="output", metavar="URL", required=True, help="answers; beside it a folder of work")
    parser.add_argument("--errors", metavar="URL", help="requests that failed (OUTPUT's name with .errors)")
    parser.add_argument(
        "--max-tokens", type=_count, metavar="N", default=1024, help="of an answer, if the request names none (1024)"
    )
    parser.add_argument("--checkpoint", metavar="URL", help="instead of the default model")
    parser.add_argument("--runner", choices=("local", "dask"), help="threads here (local), or worker processes")
    parser.add_argument("--workers", type=_count, metavar="N", help="worker processes, for dask (1)")
    parser.add_argument("--dask-address", metavar="ADDRESS", help="your own cluster's scheduler; implies --runner dask")
    parser.add_argument("--deadline", metavar="TIME", help="stop by this local time (06:00), or after so long (2h30m)")


def _add_models_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    about = {
        "inspect": "Family, sizes, formats, memory in each precision, which machines hold it; reads no weights.",
        "check": "Compare our forward pass with reference fixtures, a line each; exits 4 on a miss.",
        "convert": "Write the INT8 checkpoint that k2batch runs, a tensor at a time. Again = go on.",
    }
    made = {}
    for action, text in about.items():
        made[action] = actions.add_parser(action, help=text, description=text)
        # Stands here too, so that it may follow the action; suppressed, or it would undo the one before it.
        made[action].add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="end stdout with JSON")
    made["inspect"].add_argument("checkpoint", metavar="URL", help="a folder, a .gguf file, or an fsspec URL of either")
    made["check"].add_argument("folders", nargs="+", metavar="DIR", help="fixture folders, or folders of them")
    made["convert"].add_argument("checkpoint", metavar="URL", help="a folder, a .gguf file, or an fsspec URL of either")
    made["convert"].add_argument("target", metavar="DIR", help="a folder for the conversion")
    made["convert"].add_argument(
        "--int4", choices=("keep", "int8"), default="keep", help="INT4 weights: kept (default), or made INT8"
    )
    made["convert"].add_argument("--plain", action="store_true", help="do not balance outliers: quicker, less exact")


def _add_job_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("spec", metavar="JOB.toml", help="the job file")
    if verb != "eval":
        parser.add_argument("--input", nargs="+", metavar="URL", help="files, folders or globs, not [input] urls")
    parser.add_argument("--output", metavar="URL", help="instead of [output] url")
    parser.add_argument("--checkpoint", metavar="URL", help="instead of [model] checkpoint")
    parser.add_argument("--runner", choices=("local", "dask", "portable"), help="instead of [deploy] runner")
    parser.add_argument("--workers", type=int, metavar="N", help="instead of [deploy] workers")
    parser.add_argument(
        "--dask-address", metavar="ADDRESS", help="your own cluster's scheduler, tcp://host:8786; implies --runner dask"
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline",
        metavar="TIME",
        help="stop by this local time (06:00), or after so long (2h30m); instead of [limits] deadline",
    )
    parser.add_argument(
        "--max-cost",
        type=float,
        metavar="X",
        help="stop before the run costs more, by [deploy] price_per_hour; instead of [limits] max_cost",
    )


def _add_progress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("auto", "bar", "lines", "json", "none"),
        default="auto",
        help="on stderr: a bar, lines, or a JSON object a line (auto: a bar in a terminal, else lines)",
    )
    parser.add_argument("--metrics", metavar="FILE", help="keep the progress in a text file for Prometheus to collect")


def _add_sparsify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="JOB.toml", help="a job whose checkpoint has experts")
    parser.add_argument(
        "--agreement", type=_share, metavar="X", default=0.99, help="tickets answered as by all experts (0.99)"
    )
    parser.add_argument("--rows", type=int, metavar="N", default=200, help="tickets, half of them held back (200)")
    parser.add_argument("-o", dest="target", metavar="FILE", required=True, help="where thresholds and report go")


def _add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.toml", help="the recipe")
    parser.add_argument("--data", metavar="DIR", default="", help="folder or URL that relative urls of data are in")
    parser.add_argument("--teacher", metavar="URL", help="instead of [compress] teacher")
    parser.add_argument("--output", metavar="DIR", help="instead of [compress] output")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def _size(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=tuple(_MEASURED), help=", ".join(_MEASURED.values()))
    parser.add_argument("--checkpoint", metavar="URL", help="instead of the default model")
    parser.add_argument("--tickets", metavar="FILE", default="", help="prompts of token ids, one JSON object a line")
    parser.add_argument("--labels", metavar="FILE", default="", help="JSON object of label to token id")
    parser.add_argument(
        "--work",
        choices=("1", "2", "labels77", "long", "mixed", "json"),
        default="1",
        help="engine: 1 scores labels, 2 generates (both as peers do), labels77 beside 2 labels, long tickets, mixed "
        "instructions, json beside free text",
    )
    parser.add_argument("--limit", type=_count, metavar="N", default=0, help="engine: tickets, not the work's number")
    parser.add_argument("--rounds", "--repeats", type=_count, metavar="N", help="timed repeats")
    parser.add_argument(
        "--precision", choices=("int8", "mixed", "bf16"), default="int8", help="quality, engine: what is run"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels: those whose name contains this")
    parser.add_argument("--plot", metavar="FILE", help="kernels: draw shares of the limit, .svg or .png")
    parser.add_argument("--limit-mb", type=int, metavar="N", default=600, help="conversion: memory it may have")
    parser.add_argument("--balanced", action="store_true", help="conversion: calibrate as well, as convert does")
    parser.add_argument(
        "--units", type=_count, metavar="N", help="flow: units of a run (40); scale: of the plan (10,000)"
    )
    parser.add_argument("--rows", type=_count, metavar="N", default=2048, help="flow: rows of a unit (2,048)")
    parser.add_argument("--runner", choices=("local", "dask"), default="local", help="flow: which runs the units")
    parser.add_argument("--workers", type=_count, metavar="N", default=2, help="flow: processes, for dask (2)")
